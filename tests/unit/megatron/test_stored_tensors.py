"""Whole tensors are put together from the parts of any layout, or refused."""

import json
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

from nemo_opdlm.megatron.stored_tensors import StoredTensors

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch says that there is no process group

WHOLE = torch.arange(4 * 6 * 2.0).view(4, 6, 2)
#: Two layers per stage, each cut into three columns.
PARTS = {f"part{i}": (slice(2 * (i // 3), 2 * (i // 3) + 2), slice(2 * (i % 3), 2 * (i % 3) + 2)) for i in range(6)}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A stacked tensor in six parts, as six ranks write it."""
    folder = tmp_path / "checkpoint"
    dcp.save({name: WHOLE[place].contiguous() for name, place in PARTS.items()}, checkpoint_id=folder)
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    entry, storage = metadata.state_dict_metadata["part0"], {}
    entry.size, entry.chunks = WHOLE.size(), []
    for index, info in metadata.storage_data.items():
        rows, columns = PARTS[index.fqn]
        offsets = torch.Size((rows.start, columns.start, 0))
        entry.chunks.append(type(metadata.state_dict_metadata["part1"].chunks[0])(offsets, torch.Size((2, 2, 2))))
        storage[type(index)("x", offsets)] = info
    metadata.state_dict_metadata, metadata.storage_data, metadata.planner_data = {"x": entry}, storage, None
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder


def test_parts_make_the_whole_and_every_layer_of_it(checkpoint: Path) -> None:
    stored = StoredTensors.open(checkpoint)
    assert stored.shapes == {"x": (4, 6, 2)} and stored.dtype("x") == torch.float32
    assert torch.equal(stored.read("x"), WHOLE)
    assert all(torch.equal(stored.read("x", row), WHOLE[row]) for row in range(4))


def test_a_part_that_nobody_stored_is_missed(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.state_dict_metadata["x"].chunks.pop()
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="of 48 values of 'x', 40 are stored"):
        StoredTensors.open(checkpoint)


def test_a_part_that_is_stored_twice_is_not_taken_for_another(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.state_dict_metadata["x"].chunks.append(metadata.state_dict_metadata["x"].chunks[0])
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="parts of 'x' overlap"):
        StoredTensors.open(checkpoint)


def test_parts_that_overlap_are_refused_although_as_many_values_are_stored(checkpoint: Path) -> None:
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    there, moved = torch.Size((0, 2, 0)), torch.Size((0, 1, 0))
    metadata.storage_data[MetadataIndex("x", moved)] = metadata.storage_data.pop(MetadataIndex("x", there))
    (chunk,) = (chunk for chunk in metadata.state_dict_metadata["x"].chunks if chunk.offsets == there)
    chunk.offsets = moved
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"\.metadata is damaged \(parts of 'x' overlap\)"):
        StoredTensors.open(checkpoint)


def test_a_part_that_is_another_tensor_is_refused(checkpoint: Path) -> None:
    torch.save(torch.zeros(4, 1, 2), other := checkpoint / "__9_0.distcp")
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    index = MetadataIndex("x", metadata.state_dict_metadata["x"].chunks[0].offsets)
    metadata.storage_data[index] = _StorageInfo(other.name, 0, other.stat().st_size)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="does not hold the part of x that the index promises"):
        StoredTensors.open(checkpoint).read("x")
