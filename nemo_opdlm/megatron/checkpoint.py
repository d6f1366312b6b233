"""Megatron's distributed checkpoints (`torch_dist`): any layout saves, any layout loads, nothing in them is executed.

The format and the sharding are those of `megatron.core.dist_checkpointing`. Its `save` and `load` themselves are not
called: the first starts helper processes that import the running script again, the second unpickles what it finds.
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_outplace,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedStateDict,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from nemo_opdlm.megatron.atomic_folder import on_every_rank, replacing
from nemo_opdlm.megatron.checksums import verify
from nemo_opdlm.megatron.layer_names import own_name
from nemo_opdlm.megatron.safe_metadata import check, is_extra_state, load_common
from nemo_opdlm.megatron.sharded_write import ShardedWrite, one_line_cause

logger = logging.getLogger(__name__)


def save_sharded(directory: str | Path, sharded_state_dict: ShardedStateDict) -> None:
    """Write a distributed checkpoint as the folder `directory`; every rank calls this.

    A checkpoint that is there already stays untouched until the new one is whole.

    Raises:
        FileExistsError: `directory` is neither a checkpoint nor empty.
        OSError: it cannot be written to, or the disk is full.
    """
    with replacing(directory) as staging:
        write_sharded(staging, sharded_state_dict)


def write_sharded(directory: Path, sharded_state_dict: ShardedStateDict) -> None:
    """Write a distributed checkpoint into an empty folder; every rank calls this.

    Raises:
        OSError: the folder cannot be written to, or the disk is full.
    """
    writing = ShardedWrite(directory, sharded_state_dict)
    writing.write()
    writing.finish()


def load_sharded(
    directory: str | Path,
    sharded_state_dict: ShardedStateDict,
    *,
    strict: bool = True,
    vocab_size: int | None = None,
) -> dict[str, Any]:
    """Load a distributed checkpoint of any layout into the layout of `sharded_state_dict`; every rank calls this.

    Tensors are read into the storage that `sharded_state_dict` refers to, and returned as well. Plain values are
    returned for its top-level keys. `_extra_state` is never read: every one is returned as None.

    Args:
        directory: the checkpoint.
        sharded_state_dict: what to load, as Megatron's `sharded_state_dict()` gives it.
        strict: refuse a checkpoint with further tensors of the same parts (`model.`, `optimizer.`).
        vocab_size: true rows of the vocabulary. Embedding and head may then have been padded to another number of rows;
            without it they must have exactly the model's.

    Raises:
        ValueError: the checkpoint is refused, damaged or of another model; one line that names file or tensor.
    """
    directory = Path(directory)
    metadata = on_every_rank(lambda: check(directory))
    request = dict_list_map_outplace(_without_extra_state, sharded_state_dict)
    # As Megatron's own load: quantized parameters are filled from high precision, their scaling history is left alone.
    force_all_tensors_to_non_fp8(request)
    wanted, local_values, factories = load_preprocess(request)
    wanted, _ = extract_sharded_base(wanted)
    on_every_rank(lambda: _compare(directory, metadata, wanted, vocab_size))
    on_every_rank(lambda: verify(directory, dist.get_rank(), dist.get_world_size()))
    _report_unused(directory, metadata, wanted, strict)

    common = load_common(directory, metadata)
    state: dict[str, Any] = {key: value for key, value in common.items() if key in sharded_state_dict}
    merge(state, local_values)
    merge(state, _read_tensors(directory, metadata, wanted))
    return apply_factory_merges(state, factories)  # type: ignore[no-any-return]


@torch.no_grad()
def load_whole(
    tensors: Mapping[str, Tensor], sharded_state_dict: ShardedStateDict, *, prefix: str, vocab_size: int, source: str
) -> dict[str, Any]:
    """Load whole tensors of another kind of checkpoint into the layout of `sharded_state_dict`; no rank waits for another.

    Args:
        tensors: Megatron name at tensor- and pipeline-parallel size 1 -> tensor; read one at a time, each once.
        sharded_state_dict: the weights to load, as Megatron's `sharded_state_dict()` gives them; they are read into the
            storage that it refers to, and returned as by `load_sharded`.
        prefix: what the keys of `sharded_state_dict` have before the names of `tensors`.
        vocab_size: true rows of the vocabulary; rows that only pad the model are set to zero.
        source: where the tensors come from, for messages.

    Raises:
        ValueError: a tensor is missing, has another shape or another number of layers; one line that names it.
    """
    request = dict_list_map_outplace(_without_extra_state, sharded_state_dict)
    force_all_tensors_to_non_fp8(request)

    def load(name: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: load(name, item) for name, item in value.items()}
        if isinstance(value, LocalNonpersistentObject):
            return value.unwrap()
        parts = value.build() if isinstance(value, ShardedTensorFactory) else [value]
        name = _whole_name(tensors, own_name(name.removeprefix(prefix)), parts[0], prefix, source)
        whole = tensors[name]
        filled = [_fill(part, whole, vocab_size, f"{source}: {name}") for part in parts]
        return value.merge_fn(filled) if isinstance(value, ShardedTensorFactory) else filled[0]

    return load("", request)  # type: ignore[no-any-return]


def _whole_name(tensors: Mapping[str, Tensor], name: str, part: ShardedTensor, prefix: str, source: str) -> str:
    """The name of a tensor of this stage in the whole model: layers count from its start, a tied head is the embedding."""
    if part.prepend_axis_num:
        num_layers, layer = part.global_shape[0], part.global_offset[0]
        if re.sub(r"(?<=layers\.)\d+", str(num_layers), name) in tensors:
            raise ValueError(f"{source} holds more layers than the model's {num_layers}")
        name = re.sub(r"(?<=layers\.)\d+", str(layer), name)
    elif name not in tensors:
        name = part.key.removeprefix(prefix)
    if name not in tensors:
        raise ValueError(f"{source} lacks {name}, which the model needs")
    return name


def _fill(part: ShardedTensor, whole: Tensor, vocab_size: int, what: str) -> Tensor:
    needs, offset = (values[part.prepend_axis_num :] for values in (part.global_shape, part.global_offset))
    is_padded = part.allow_shape_mismatch and len(whole) == vocab_size and whole.shape[1:] == needs[1:]
    if tuple(whole.shape) != needs and not (is_padded and needs[0] > vocab_size):
        raise ValueError(f"{what} has shape {list(whole.shape)}, the model needs {list(needs)}")
    region = whole[tuple(slice(start, start + size) for start, size in zip(offset, part.local_shape, strict=True))]
    data: Tensor = part.data
    data[: len(region)] = region
    data[len(region) :] = 0
    return data


class _CheckedReader(FileSystemReader):
    """Uses the index that was checked instead of unpickling the file again."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__(directory)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


class _TensorPlanner(MCoreLoadPlanner):
    """Loads tensors only."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        raise AssertionError(f"byte entry {read_item.dest_index.fqn!r} was requested")


def _without_extra_state(value: Any) -> Any:
    if not isinstance(value, ShardedObject):
        return value
    assert is_extra_state(value.key), f"{value.key}: checkpoints hold tensors and plain values, no sharded objects"
    return LocalNonpersistentObject(None)


def _read_tensors(directory: Path, metadata: Metadata, wanted: ShardedStateDict) -> dict[str, Any]:
    tensors = [value for value in nested_values(wanted) if isinstance(value, ShardedTensor)]
    by_key, structure, names = _replace_state_dict_keys_with_sharded_keys(wanted)
    state = mcore_to_pyt_state_dict(by_key, is_loading=True)
    planner = _TensorPlanner(
        shapes_validation_sharded_tensors=[tensor for tensor in tensors if not tensor.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={t.key: t for t in tensors if t.allow_shape_mismatch},
        flatten_state_dict=False,
    )
    try:
        load(state, storage_reader=_CheckedReader(directory, metadata), planner=planner)
    except (Exception, CheckpointException) as error:
        raise ValueError(f"{directory} is damaged: {one_line_cause(error)}") from error
    loaded = {key: _unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
    nested = _replace_sharded_keys_with_state_dict_keys(loaded, structure, names)
    _restore_dict_types(nested, wanted)
    return nested  # type: ignore[no-any-return]


def _compare(directory: Path, metadata: Metadata, wanted: ShardedStateDict, vocab_size: int | None) -> None:
    """Check that every wanted tensor is there in its size. (Megatron zero-fills an embedding that is too short.)"""
    tensors = {value.key: value for value in nested_values(wanted) if isinstance(value, ShardedTensor)}
    entries = metadata.state_dict_metadata.items()
    stored = {key: tuple(entry.size) for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
    missing = [key for key in tensors if key not in stored]
    if missing:
        raise ValueError(f"{directory} lacks {len(missing)} tensors that the model needs, such as {missing[0]}")
    for key, tensor in tensors.items():
        has, needs = stored[key], tuple(tensor.global_shape)
        may_be_padded = tensor.allow_shape_mismatch and has[1:] == needs[1:]
        if has != needs and not (may_be_padded and vocab_size is not None and has[0] >= vocab_size):
            raise ValueError(f"{directory}: {key} has shape {list(has)}, the model needs {list(needs)}")


def _report_unused(directory: Path, metadata: Metadata, wanted: ShardedStateDict, strict: bool) -> None:
    mine = {value.key for value in nested_values(wanted) if isinstance(value, ShardedTensor)}
    requests: list[set[str]] = [set() for _ in range(dist.get_world_size())]
    dist.all_gather_object(requests, mine)
    used = set().union(*requests)
    parts = {key.split(".")[0] for key in used}
    entries = metadata.state_dict_metadata.items()
    tensors = [key for key, entry in entries if isinstance(entry, TensorStorageMetadata)]
    unused = [key for key in tensors if key not in used and key.split(".")[0] in parts]
    if not unused:
        return
    problem = f"{directory} holds {len(unused)} tensors that the model has no place for, such as {unused[0]}"
    if strict:
        raise ValueError(problem)
    logger.warning(problem)
