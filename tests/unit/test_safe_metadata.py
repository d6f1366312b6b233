"""A checkpoint index is either read exactly or refused; it never executes anything."""

import io
import json
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType

from nemo_opdlm.megatron import safe_metadata
from nemo_opdlm.megatron.stored_tensors import StoredTensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that there is no process group


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    """The file that a crafted checkpoint would create."""
    return tmp_path / "victim"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small distributed checkpoint as Megatron lays it out."""
    folder = tmp_path / "checkpoint"
    tensors = {"model.a": torch.arange(12.0).view(3, 4), "model.b": torch.ones(5, dtype=torch.bfloat16)}
    dcp.save({**tensors, "model.norm._extra_state": None}, checkpoint_id=folder)
    torch.save({"optimizer": {"lr": 1.0}}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist", "sharded_backend_version": 1}))
    return folder


def stored(checkpoint: Path) -> Metadata:
    """The index as torch reads it, for comparison and for editing."""
    return pickle.loads((checkpoint / ".metadata").read_bytes())


def edit(checkpoint: Path, change: Callable[[Metadata], Any]) -> None:
    metadata = stored(checkpoint)
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def refusal(checkpoint: Path) -> str:
    with pytest.raises(ValueError) as caught:
        safe_metadata.check(checkpoint)
    message = str(caught.value)
    assert "\n" not in message and str(checkpoint) in message
    return message


def test_index_reads_as_torch_reads_it(checkpoint: Path) -> None:
    expected, actual = stored(checkpoint), safe_metadata.check(checkpoint)
    assert actual.state_dict_metadata == expected.state_dict_metadata
    assert actual.storage_data == expected.storage_data


def test_writing_plans_that_megatron_adds_are_ignored(checkpoint: Path) -> None:
    item = WriteItem(index=MetadataIndex("model.a", (0, 0)), type=WriteItemType.SHARD)
    edit(checkpoint, lambda metadata: setattr(metadata, "all_local_plans", [SavePlan([item])]))
    assert safe_metadata.check(checkpoint).state_dict_metadata == stored(checkpoint).state_dict_metadata


def test_common_state_is_read_from_a_byte_entry_where_newer_megatron_puts_it(checkpoint: Path) -> None:
    (checkpoint / "common.pt").unlink()
    torch.save([{"step": 3}], checkpoint / "__9_0.distcp")
    size = (checkpoint / "__9_0.distcp").stat().st_size

    def add(metadata: Metadata) -> None:
        metadata.state_dict_metadata[safe_metadata.COMMON_ENTRY] = BytesStorageMetadata()
        info = dcp.filesystem._StorageInfo("__9_0.distcp", 0, size)
        metadata.storage_data[MetadataIndex(safe_metadata.COMMON_ENTRY)] = info

    edit(checkpoint, add)
    assert safe_metadata.load_common(checkpoint, safe_metadata.check(checkpoint)) == {"step": 3}


@pytest.mark.parametrize("where", ["instead of the index", "within a field", "as a key", "as another attribute"])
def test_index_that_would_execute_code_is_refused(checkpoint: Path, victim: Path, where: str) -> None:
    def plant(metadata: Metadata) -> None:
        if where == "within a field":
            metadata.state_dict_metadata["model.a"].chunks.append(Touch(victim))
        elif where == "as a key":
            metadata.storage_data[Touch(victim)] = None
        else:
            metadata.planner_data = Touch(victim)

    if where == "instead of the index":
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Touch(victim)))
    else:
        edit(checkpoint, plant)
    assert "it refers to" in refusal(checkpoint)
    assert not victim.exists()
    stored(checkpoint)
    assert victim.exists(), "torch itself would have executed it"


@pytest.mark.parametrize(
    "pickled",
    [
        b"cos\nsystem\n(S'touch %s'\ntR.",
        b'cbuiltins\neval\n(S\'open("%s", "w")\'\ntR.',
        b"\x80\x04\x8c\x05torch\x94\x8c\x10Size.__new__.x.y\x94\x93\x94.",  # a dotted name reaches into allowed classes
        b"\x80\x04\x8c\x11torch._C._jit_cls\x94\x8c\x04load\x94\x93\x94.",
        b"ctorch\nload\n.",
    ],
)
def test_hand_written_pickles_are_refused(checkpoint: Path, victim: Path, pickled: bytes) -> None:
    (checkpoint / ".metadata").write_bytes(pickled.replace(b"%s", str(victim).encode()))
    assert "it refers to" in refusal(checkpoint)
    assert not victim.exists()


@pytest.mark.parametrize("force", [False, True])
def test_common_state_that_would_execute_code_is_refused(
    checkpoint: Path, victim: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    if force:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"args": Touch(victim)}, checkpoint / "common.pt")
    assert "holds more than plain data" in refusal(checkpoint)
    assert not victim.exists()


def test_pickled_objects_among_the_tensors_are_refused(checkpoint: Path) -> None:
    edit(checkpoint, lambda metadata: metadata.state_dict_metadata.update({"model.a": BytesStorageMetadata()}))
    assert "'model.a' is a pickled object" in refusal(checkpoint)


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "..", ""])
def test_files_outside_of_the_checkpoint_are_refused(checkpoint: Path, name: str) -> None:
    def redirect(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    edit(checkpoint, redirect)
    assert "outside of its folder" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        (".metadata", None, "is missing"),
        (".metadata", b"", "is damaged"),
        (".metadata", pickle.dumps({"model.a": 1}), "is damaged"),
        ("metadata.json", None, "is missing"),
        ("metadata.json", b"{", "is damaged"),
        ("metadata.json", b'{"sharded_backend": "zarr"}', "left Megatron-core"),
        ("metadata.json", b'{"sharded_backend": "other"}', "unknown format"),
        ("common.pt", None, "is missing"),
        ("common.pt", b"no zip", "is"),
        ("__0_0.distcp", None, "is missing"),
        ("__0_0.distcp", b"short", "is truncated"),
    ],
)
def test_missing_and_damaged_files_are_named(checkpoint: Path, file: str, content: bytes | None, expected: str) -> None:
    path = checkpoint / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    message = refusal(checkpoint)
    assert message.startswith(str(path)) and expected in message


def test_missing_folder_is_named(tmp_path: Path) -> None:
    assert "no such checkpoint folder" in refusal(tmp_path / "nowhere")


def test_part_of_a_tensor_that_is_nowhere_stored_is_refused(checkpoint: Path) -> None:
    edit(checkpoint, lambda metadata: metadata.storage_data.pop(MetadataIndex("model.a", (0, 0))))
    assert "'model.a' is nowhere stored" in refusal(checkpoint)


# -- indices that are made to bring down whoever reads them --


def nested_key(depth: int) -> bytes:
    """A dictionary whose key is so many tuples within tuples; hashing them overflows the C stack."""
    return b"\x80\x04})" + b"\x85" * depth + b"Ns."


def test_pickles_that_overflow_the_stack_or_the_memory_are_refused(checkpoint: Path) -> None:
    for pickled, expected in (
        (nested_key(10**6), "tuples are nested"),
        (b"\x80\x04Nr\xff\xff\xff\x7f.", "memo is larger"),
    ):
        (checkpoint / ".metadata").write_bytes(pickled)
        assert ".metadata is refused: " in (message := refusal(checkpoint)) and expected in message


def test_plain_values_that_overflow_the_stack_are_refused(checkpoint: Path) -> None:
    whole = zipfile.ZipFile(io.BytesIO((checkpoint / "common.pt").read_bytes()))
    with zipfile.ZipFile(checkpoint / "common.pt", "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, nested_key(10**6) if name.endswith("data.pkl") else whole.read(name))
    assert "common.pt is refused" in (message := refusal(checkpoint)) and "tuples are nested" in message


def test_compressed_plain_values_are_refused(checkpoint: Path) -> None:
    whole = zipfile.ZipFile(io.BytesIO((checkpoint / "common.pt").read_bytes()))
    with zipfile.ZipFile(checkpoint / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in whole.namelist():
            archive.writestr(name, whole.read(name))
    assert "common.pt is refused" in (message := refusal(checkpoint)) and "compressed" in message


def test_tensors_of_more_values_than_are_stored_are_refused(checkpoint: Path) -> None:
    def change(**fields: Any) -> Callable[[Metadata], None]:
        def edit_entry(metadata: Metadata) -> None:
            for name, value in fields.items():
                entry = metadata.state_dict_metadata["model.a"]
                setattr(entry if name == "size" else entry.chunks[0], name, torch.Size(value))
            chunk = metadata.state_dict_metadata["model.a"].chunks[0]
            info = metadata.storage_data.pop(MetadataIndex("model.a", (0, 0)))
            metadata.storage_data[MetadataIndex("model.a", chunk.offsets)] = info

        return edit_entry

    whole = (checkpoint / ".metadata").read_bytes()
    for fields, expected in (
        ({"size": (10**9, 10**9)}, "of 1000000000000000000 values of 'model.a', 12 are stored"),
        ({"size": (10**9, 10**9), "sizes": (10**9, 10**9)}, "is larger than what is stored of it"),
        ({"offsets": (1, 0)}, "lies outside of it"),
        ({"offsets": (0,), "sizes": (3,)}, "lies outside of it"),
    ):
        (checkpoint / ".metadata").write_bytes(whole)
        edit(checkpoint, change(**fields))
        assert expected in refusal(checkpoint)


def test_a_part_that_repeats_one_value_by_its_strides_is_refused(checkpoint: Path) -> None:
    stored_tensors = StoredTensors.open(checkpoint)
    part = checkpoint / "__0_0.distcp"
    for info in stored_tensors.index.storage_data.values():
        stream = io.BytesIO()
        torch.save(torch.zeros(1).expand(3, 4), stream)
        content = bytearray(part.read_bytes())
        content[info.offset : info.offset + info.length] = stream.getvalue().ljust(info.length, b"\0")
        part.write_bytes(content)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged"):
        stored_tensors.read("model.a")


def test_messages_never_write_out_what_the_index_holds(checkpoint: Path) -> None:
    # Tuples that each hold the one before three times: some hundred bytes whose text has a billion characters.
    bomb: Any = ("x",)
    for _ in range(20):
        bomb = (bomb, bomb, bomb)
    edit(checkpoint, lambda metadata: setattr(metadata.state_dict_metadata["model.a"].properties, "dtype", bomb))
    assert "a tuple is no dtype" in refusal(checkpoint)


def test_any_damage_is_either_harmless_or_refused_in_one_line(checkpoint: Path) -> None:
    whole = (checkpoint / ".metadata").read_bytes()
    rng = random.Random(0)
    flipped = [bytes(rng.randrange(256) if rng.random() < 0.02 else byte for byte in whole) for _ in range(200)]
    for damaged in [*(whole[:length] for length in range(0, len(whole), 7)), *flipped]:
        (checkpoint / ".metadata").write_bytes(damaged)
        try:
            metadata = safe_metadata.read_metadata(checkpoint)
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            assert isinstance(metadata, Metadata)
