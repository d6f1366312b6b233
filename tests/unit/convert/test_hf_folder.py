"""Folders: what is missing is named before any weight is read; nothing half-written is ever left behind."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nemo_opdlm.convert.hf_folder import load_hf_folder, save_hf_folder, write_folder


@pytest.fixture
def folder(tmp_path: Path, make_tokenizer_files: Callable[..., dict[str, bytes]]) -> Path:
    """A folder of three tensors in three shards."""
    save(tmp_path / "model", files={"config.json": {}, **make_tokenizer_files()}, max_shard_size=20)
    return tmp_path / "model"


TENSORS = {"a": torch.arange(4.0), "b": torch.arange(6.0).view(2, 3), "c": torch.ones(3, dtype=torch.bfloat16)}


def save(path: Path, files: dict[str, object] | None = None, max_shard_size: int = 10**6) -> None:
    sizes = {name: tensor.nbytes for name, tensor in TENSORS.items()}
    save_hf_folder(path, TENSORS.items(), sizes, files or {}, max_shard_size)


def test_sharded_weights_come_back_unchanged(folder: Path) -> None:
    assert len(list(folder.glob("model-*-of-00003.safetensors"))) == 3
    loaded = load_hf_folder(folder)
    assert loaded.shapes == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        assert loaded.dtypes[name] == tensor.dtype
        assert torch.equal(loaded.tensor(name), tensor)


def test_small_weights_are_one_file_without_index(tmp_path: Path) -> None:
    save(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["model.safetensors"]


def test_index_names_every_tensor_and_the_total_size(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == TENSORS.keys()
    assert index["metadata"]["total_size"] == 16 + 24 + 6


def remove(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def truncate(folder: Path) -> None:
    shard = folder / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])


def misplace(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["a"] = content["weight_map"]["b"]
    index.write_text(json.dumps(content))


def escape(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def pickle_only(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove("config.json"), "has no config.json"),
        (remove("tokenizer.json"), "has no tokenizer: tokenizer.json is missing; re-save it"),
        (remove("tokenizer.json", "tokenizer_config.json"), "has no tokenizer: tokenizer.json is missing$"),
        (remove("model-00002-of-00003.safetensors"), "lacks shard model-00002-of-00003.safetensors"),
        (remove("model.safetensors.index.json"), "has no weights: neither model.safetensors nor"),
        (pickle_only, "pickled pytorch_model.bin is refused: re-save"),
        (truncate, "model-00002-of-00003.safetensors is not a readable safetensors file"),
        (misplace, "model-00001-of-00003.safetensors|does not hold tensor a"),
        (escape, "places tensor a in '../model.safetensors', which is not a file name"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read as JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json must hold a JSON object, not a list"),
    ],
    ids=[
        "config",
        "tokenizer-json",
        "tokenizer",
        "shard",
        "weights",
        "pickle",
        "truncated",
        "misplaced",
        "escape",
        "broken-json",
        "no-object",
    ],
)
def test_a_broken_folder_is_refused_with_the_culprits_name(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_hf_folder(folder)


def test_a_missing_folder_is_not_taken_for_a_hub_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a folder; give a local Hugging Face folder"):
        load_hf_folder(tmp_path / "Qwen" / "Qwen3-0.6B")


def test_an_existing_output_is_refused_and_untouched(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("keep")
    with pytest.raises(ValueError, match="model exists already"):
        save(tmp_path / "model")
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["mine"]


def test_an_empty_output_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    save(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_disk_without_room_is_refused_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=45))
    with pytest.raises(ValueError, match="model needs 0.0 GB, but only 0.0 GB are free"):
        save(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_after_an_error_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(KeyError), write_folder(tmp_path / "model") as temporary:
        (temporary / "half").write_text("written")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_files_of_a_written_folder_are_as_readable_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    save(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
