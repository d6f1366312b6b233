"""Archives of a tiny model: they hold what it takes to build it anywhere, and are refused before anything is built."""

import pickle
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from nemo_opdlm.models.archive_format import read_archive_config
from tests.integration.toy_model import (
    CONFIG,
    Touch,
    ToyModel,
    disk_full_after,
    make_model,
    same,
    train,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def archive(tmp_path: Path) -> tuple[ToyModel, Path]:
    """A trained model and its archive."""
    tokenizer = tmp_path / "cluster" / "toy"
    tokenizer.mkdir(parents=True)
    (tokenizer / "tokenizer.json").write_bytes(b'{"version": "1.0"}')
    (tokenizer / "tokenizer_config.json").write_bytes(b"{}")
    model = make_model(tokenizer={"library": "huggingface", "type": str(tokenizer)})
    train(model, range(2))
    model.save_to(str(tmp_path / "toy.nemo"))
    return model, tmp_path / "toy.nemo"


def test_archive_restores_weights_settings_and_tokenizer(archive: tuple[ToyModel, Path]) -> None:
    model, path = archive
    restored = ToyModel.restore_from(str(path))
    assert same(weights(model), weights(restored))
    assert restored.tokenizer_files == model.tokenizer_files and len(model.tokenizer_files) == 2
    assert restored.cfg.tokenizer == {"library": "huggingface", "type": "toy"}
    assert restored.cfg.num_layers == CONFIG["num_layers"]
    with tarfile.open(path) as tar:
        names = tar.getnames()
        text = tar.extractfile("./model_config.yaml").read().decode()  # type: ignore[union-attr]
    assert all(name.startswith("./") for name in names) and "./model_weights/.metadata" in names
    assert str(path.parent) not in text and "prompts.jsonl" not in text


def test_restored_model_can_be_saved_again_without_the_first_archive(archive: tuple[ToyModel, Path]) -> None:
    model, path = archive
    restored = ToyModel.restore_from(str(path))
    settings = read_archive_config(path)
    path.unlink()
    restored.save_to(str(path))
    again = ToyModel.restore_from(str(path))
    assert same(weights(model), weights(again)) and again.tokenizer_files == model.tokenizer_files
    assert read_archive_config(path) == settings
    assert sorted(file.name for file in path.parent.iterdir()) == ["cluster", "toy.nemo"]


def test_archive_written_as_a_folder_restores(archive: tuple[ToyModel, Path], tmp_path: Path) -> None:
    model, _ = archive
    model._save_restore_connector.pack_nemo_file = False
    model.save_to(str(tmp_path / "folder"))
    assert same(weights(model), weights(ToyModel.restore_from(str(tmp_path / "folder"))))


def test_other_settings_replace_the_stored_ones(archive: tuple[ToyModel, Path], tmp_path: Path) -> None:
    model, path = archive
    override = OmegaConf.create({"model": {**CONFIG, "vocab_size": 30, "padded_vocab_size": 34}})
    restored = ToyModel.restore_from(str(path), override_config_path=override)
    assert torch.equal(weights(restored)[0][:30], weights(model)[0][:30])
    assert restored.tokenizer_files == model.tokenizer_files
    assert ToyModel.restore_from(str(path), return_config=True).num_layers == CONFIG["num_layers"]
    with pytest.raises(ValueError, match="has shape"):
        ToyModel.restore_from(str(path), override_config_path=OmegaConf.create({**CONFIG, "num_layers": 1}))


class NeverBuilt(ToyModel):
    """Refused archives must be refused before this."""

    def __init__(self, cfg: DictConfig, trainer: Any = None) -> None:
        raise AssertionError("a model was built")


NeverBuilt.__name__ = "ToyModel"


def test_archive_that_would_execute_code_is_refused_before_anything_is_built(
    archive: tuple[ToyModel, Path], tmp_path: Path
) -> None:
    _, path = archive
    with tarfile.open(path) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    index = tmp_path / "unpacked" / "model_weights" / ".metadata"
    index.write_bytes(pickle.dumps(Touch(tmp_path / "victim")))
    with tarfile.open(path, "w") as tar:
        tar.add(tmp_path / "unpacked", ".")
    with pytest.raises(ValueError, match=r"toy.nemo: model_weights/.metadata is refused"):
        NeverBuilt.restore_from(str(path))
    assert not (tmp_path / "victim").exists()


def test_archive_of_another_class_is_refused(archive: tuple[ToyModel, Path]) -> None:
    class OtherModel(NeverBuilt):
        """Another class."""

    with pytest.raises(ValueError, match=r"toy.nemo: .*a model of class \S+ToyModel, not OtherModel"):
        OtherModel.restore_from(str(archive[1]))


def test_full_disk_leaves_the_older_archive_whole(archive: tuple[ToyModel, Path]) -> None:
    model, path = archive
    before = path.read_bytes()
    with disk_full_after(4096), pytest.raises(OSError, match="cannot write"):
        model.save_to(str(path))
    assert path.read_bytes() == before
    assert sorted(file.name for file in path.parent.iterdir()) == ["cluster", "toy.nemo"]
