"""The `.nemo` file format: what goes in comes out, and what could do harm or is broken is refused by name."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from nemo_opdlm.models.archive_format import (
    check_class,
    check_output,
    is_trained,
    open_nemo,
    portable_config,
    read_archive_config,
    write_nemo,
)
from nemo_opdlm.models.safe_tar import ArchiveError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that there is no process group

CONFIG = {
    "num_layers": 2,
    "layernorm_epsilon": 1e-06,
    "rope_scaling": None,
    "restore_from_path": "/cluster/qwen.nemo",
    "tokenizer": {"library": "huggingface", "type": "/cluster/models/toy", "use_fast": True},
    "data": {"train_ds": {"file_path": "prompts.jsonl", "max_prompt_length": 20}},
    "opdlm": {"block_size": 4, "note": "1e5", "ünïcode": "→"},
}
TOKENIZER = {"tokenizer.json": b'{"a": 1}', "chat_template.jinja": "{{ ü }}".encode()}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A small distributed checkpoint as Megatron lays it out."""
    folder = tmp_path / "weights"
    dcp.save({"model.a": torch.arange(500.0)}, checkpoint_id=folder)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    return folder


@pytest.fixture
def nemo(tmp_path: Path, weights: Path) -> Path:
    """A whole archive."""
    path = tmp_path / "toy.nemo"
    write_nemo(path, CONFIG, weights, TOKENIZER)
    return path


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def rewrite(path: Path, change: Callable[[dict[str, tuple[tarfile.TarInfo, bytes]]], Any]) -> None:
    """Pack an archive anew with other members."""
    with tarfile.open(path) as tar:
        members = {m.name: (m, tar.extractfile(m).read() if m.isreg() else b"") for m in tar}  # type: ignore[union-attr]
    change(members)
    with tarfile.open(path, "w") as tar:
        for name, (member, data) in members.items():
            member.name, member.size = name, len(data)
            tar.addfile(member, io.BytesIO(data))


def add(name: str, kind: bytes = tarfile.REGTYPE, target: str = "") -> Callable[[dict[str, Any]], None]:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return lambda members: members.update({name: (member, b"" if target or kind != tarfile.REGTYPE else b"x")})


def configure(text: str | bytes) -> Callable[[dict[str, Any]], None]:
    data = text.encode() if isinstance(text, str) else text
    name = "./model_config.yaml"
    return lambda members: members.update({name: (members[name][0], data)})


def drop(prefix: str) -> Callable[[dict[str, Any]], None]:
    return lambda members: [members.pop(name) for name in list(members) if name.startswith(prefix)]


def refusal(path: Path) -> str:
    with pytest.raises(ArchiveError) as caught, open_nemo(path):
        pass
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("pack", [True, False])
def test_what_goes_in_comes_out(tmp_path: Path, weights: Path, pack: bool) -> None:
    path = tmp_path / "out" / "toy.nemo"
    write_nemo(path, CONFIG, weights, TOKENIZER, pack=pack)
    with open_nemo(path) as archive:
        assert content(archive.weights) == content(weights)
        assert archive.tokenizer is not None and content(archive.tokenizer) == TOKENIZER
        assert archive.config == read_archive_config(path)
        folder = archive.folder
    assert folder.exists() is not pack
    assert [file.name for file in path.parent.iterdir()] == ["toy.nemo"]


def test_settings_keep_values_and_types_but_no_places(nemo: Path) -> None:
    config = read_archive_config(nemo)
    assert config == {
        "target": "nemo_opdlm.models.opdlm_model.OPDLMModel",
        "num_layers": 2,
        "layernorm_epsilon": 1e-06,
        "rope_scaling": None,
        "tokenizer": {"library": "huggingface", "type": "toy", "use_fast": True},
        "data": {"train_ds": {"max_prompt_length": 20}},
        "opdlm": {"block_size": 4, "note": "1e5", "ünïcode": "→"},
    }
    assert isinstance(config["layernorm_epsilon"], float)


def test_archive_is_a_plain_tar_that_users_can_inspect(nemo: Path) -> None:
    with tarfile.open(nemo, "r:") as tar:
        members = tar.getmembers()
        text = tar.extractfile("./model_config.yaml").read().decode()  # type: ignore[union-attr]
    names = [member.name for member in members]
    assert names[0] == "./model_config.yaml" and all(name.startswith("./") for name in names)
    files = [name for name in names if "tokenizer.json" in name]
    assert len(files) == 1 and len(files[0]) == len("./") + 32 + len("_tokenizer.json")
    assert f"tokenizer_json: nemo:{files[0][2:]}" in text
    assert "/cluster" not in text
    assert {(member.uid, member.uname) for member in members} == {(0, "")}


def test_paths_within_lists_and_by_known_keys_are_left_out() -> None:
    config = {"a": ["/x", "y"], "b": {"data_prefix": "z", "c": 1}, "resume_from_checkpoint": None, "d": "/home/me/x"}
    assert portable_config(config) == {"a": ["y"], "b": {"c": 1}}


def test_existing_output_is_left_untouched(nemo: Path, weights: Path) -> None:
    before = nemo.read_bytes()
    with pytest.raises(FileExistsError, match="toy.nemo exists already"):
        write_nemo(nemo, CONFIG, weights, {})
    assert nemo.read_bytes() == before
    write_nemo(nemo, CONFIG, weights, {}, overwrite=True)
    with open_nemo(nemo) as archive:
        assert archive.tokenizer is None


def test_failed_write_leaves_nothing_behind(nemo: Path, tmp_path: Path) -> None:
    before = content(tmp_path)
    with pytest.raises(OSError, match="cannot write"):
        write_nemo(nemo, CONFIG, tmp_path / "no weights here", TOKENIZER, overwrite=True)
    assert content(tmp_path) == before


def test_folders_that_are_no_models_are_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="is a folder and no model"):
        check_output(tmp_path, overwrite=True)


def test_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write .*file/toy.nemo"):
        check_output(tmp_path / "file" / "toy.nemo")


def test_extraction_happens_beside_the_archive_or_in_tmpdir(
    nemo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    with open_nemo(nemo) as archive:
        assert nemo.parent in archive.folder.parents
    with open_nemo(nemo, scratch=tmp_path / "weights") as archive:
        assert tmp_path / "weights" in archive.folder.parents


def test_compressed_archives_of_old_are_read(nemo: Path) -> None:
    expected = read_archive_config(nemo)
    nemo.write_bytes(gzip.compress(nemo.read_bytes()))
    assert read_archive_config(nemo) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (add("../evil"), "'../evil' points outside"),
        (add("./model_weights/../../evil"), "points outside"),
        (add("/etc/evil"), "'/etc/evil' points outside"),
        (add("./link", tarfile.SYMTYPE, "/etc/passwd"), "'./link' is a link or device"),
        (add("./link", tarfile.LNKTYPE, "./model_config.yaml"), "'./link' is a link or device"),
        (add("./device", tarfile.CHRTYPE), "'./device' is a link or device"),
        (add("./pipe", tarfile.FIFOTYPE), "'./pipe' is a link or device"),
        (add("model_config.yaml"), "'model_config.yaml' occurs twice"),
        (add("./model_weights/.metadata/x"), "cannot be extracted"),
        (drop("./model_config.yaml"), "model_config.yaml is missing"),
        (drop("./model_weights"), "model_weights/ is missing"),
        (add("./model_weights.ckpt"), "model_weights.ckpt holds the weights of one process"),
        (add("./mp_rank_00/model_weights.ckpt"), "mp_rank_00/model_weights.ckpt holds"),
        (add("./tp_rank_00_pp_rank_000/x"), "per model-parallel rank"),
        (add("./model_weights/a/.zarray"), "zarr"),
        (configure("a: [1"), "model_config.yaml cannot be read"),
        (configure(b"\xff\xfe\x00"), "model_config.yaml cannot be read"),
        (configure("- 1\n- 2\n"), "model_config.yaml holds no settings"),
        (configure(""), "model_config.yaml holds no settings"),
        (configure("a: ${oc.env:HOME}"), "reference"),
        (configure("!!python/object/apply:os.system ['touch victim']"), "model_config.yaml cannot be read"),
        (configure("tokenizer: {files: {a: nemo:../../etc/passwd}}"), "which is no member of an archive"),
        (configure(f"tokenizer: {{files: {{a: nemo:{'0' * 32}_tokenizer.json}}}}"), "the tokenizer is not complete"),
    ],
)
def test_unsafe_and_broken_archives_are_refused_by_name(
    nemo: Path, tmp_path: Path, change: Callable[[dict[str, Any]], Any], expected: str
) -> None:
    rewrite(nemo, change)
    files = set(tmp_path.rglob("*"))
    assert expected in refusal(nemo)
    assert set(tmp_path.rglob("*")) == files


@pytest.mark.parametrize("data", [b"", b"no tar", bytes(10_000), gzip.compress(b"no tar either", mtime=0)])
def test_files_that_are_no_archives_are_refused(nemo: Path, data: bytes) -> None:
    nemo.write_bytes(data)
    assert "no .nemo archive" in refusal(nemo)
    with pytest.raises(ArchiveError, match="no .nemo archive"):
        read_archive_config(nemo)


def test_archive_cut_off_anywhere_is_refused(nemo: Path) -> None:
    whole = nemo.read_bytes()
    with tarfile.open(nemo) as tar:
        end = max(member.offset_data + member.size for member in tar)
    for length in range(1, end, 1999):
        nemo.write_bytes(whole[:length])
        assert refusal(nemo)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.nemo"), open_nemo(tmp_path / "nowhere.nemo"):
        pass


def test_unsafe_weights_are_named_by_archive_and_member(tmp_path: Path, weights: Path) -> None:
    (weights / ".metadata").write_bytes(b"cos\nsystem\n(S'exit'\ntR.")
    path = tmp_path / "toy.nemo"
    write_nemo(path, CONFIG, weights, {})
    assert refusal(path).startswith(f"{path}: model_weights/.metadata is refused: it refers to os.system")


def test_models_of_another_class_are_refused(tmp_path: Path, weights: Path) -> None:
    target = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
    write_nemo(tmp_path / "gpt.nemo", {**CONFIG, "target": target}, weights, {})
    with open_nemo(tmp_path / "gpt.nemo") as archive, pytest.raises(ArchiveError, match="MegatronGPTModel, not OPDLM"):
        check_class(archive)


# -- archives that are made to do harm --


def pax_chain(length: int) -> bytes:
    """Extended headers that describe extended headers."""
    header = tarfile.TarInfo("x")
    header.type = tarfile.XHDTYPE
    return header.tobuf(tarfile.USTAR_FORMAT) * length


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, pax: dict[str, str] | None = None) -> bytes:
    """The header of a member that claims a size, without a body."""
    member = tarfile.TarInfo(name)
    member.size, member.type, member.pax_headers = size, kind, pax or {}
    return member.tobuf(tarfile.PAX_FORMAT if pax else tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (header("x", -512), "damaged"),
        (header("x", -(2**40)), "damaged"),
        (header("x", 0, pax={"size": "-1024"}), "claims -1024 bytes"),
        (header("x", 2**60), "truncated within 'x'"),
        (header("x", 2**30, tarfile.GNUTYPE_LONGNAME), "claims 1073741824 bytes"),
        (header("x", 2**62, tarfile.XHDTYPE), "claims"),
        (header("x", 2**40, tarfile.GNUTYPE_SPARSE), "sparse file"),
        (pax_chain(2000), "damaged"),
        (header("a/" * 500 + "x", 0), "has a name that no such file has"),
        (header("x\nerror: all is well", 0), "has a name that no such file has"),
    ],
)
def test_headers_that_claim_the_impossible_are_refused(nemo: Path, start: bytes, expected: str) -> None:
    with tarfile.open(nemo) as tar:
        second = tar.getmembers()[1].offset
    whole = nemo.read_bytes()
    for place in (0, second):
        nemo.write_bytes(whole[:place] + start + whole[place:])
        assert expected in (message := refusal(nemo)) or (place == 0 and "no tar file" in message)


def test_an_archive_that_unpacks_to_a_thousand_times_its_size_is_refused(nemo: Path) -> None:
    bomb = io.BytesIO()
    with gzip.GzipFile(fileobj=bomb, mode="wb", compresslevel=1) as stream:
        stream.write(header("x", 2**27) + bytes(2**27))
    nemo.write_bytes(bomb.getvalue())
    assert "claims 134217728 bytes" in refusal(nemo)


def alias_bomb(first: str, then: str) -> str:
    """A YAML text in which every line holds the one before several times."""
    lines = [f"a: &a {first}"]
    for previous, name in zip("abcdefghijk", "bcdefghijkl", strict=True):
        lines.append(f"{name}: &{name} {then.format('*' + previous)}")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r'a: "\x24{oc.env:HOME}"', "reference"),
        (r'"\x24{oc.env:HOME}": 1', "reference"),
        ("a: &a [" + "[" * 300 + "]" * 301, "nested more than"),
        ("a: &a {b: *a}", "stands in what it is an alias of"),
        (alias_bomb("[x, x, x]", "[{0}, {0}, {0}]"), "values"),
        (alias_bomb("{x: 1}", "{{<<: [{0}, {0}, {0}]}}"), "values"),
        ("a: " + "x" * 2**20, "more than 1 MiB"),
        (f"a: {'9' * 5000}", "cannot be read"),
        (f"tokenizer: {{files: {{a: nemo:{'0' * 32}_..}}}}", "no member of an archive"),
    ],
)
def test_settings_that_would_explode_or_look_around_are_refused(nemo: Path, text: str, expected: str) -> None:
    rewrite(nemo, configure(text))
    assert expected in refusal(nemo)


def test_a_student_is_told_from_a_converted_model_by_the_settings_of_its_run_or_its_block_size(nemo: Path) -> None:
    converted = read_archive_config(nemo)
    assert not is_trained(converted) and not is_trained(
        {**converted, "origin": {"family": "qwen3", "block_size": None}}
    )
    assert is_trained({**converted, "optim": {"lr": 1e-5}})
    assert is_trained({**converted, "origin": {"family": "qwen3", "block_size": 8}})
