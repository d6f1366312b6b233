"""Reads the index of a distributed checkpoint without executing anything in it.

A `torch_dist` checkpoint is described by a pickle (`.metadata`), keeps further pickles beside its tensors (byte
entries) and a third kind in `common.pt`; torch and Megatron unpickle the first two without restriction. Here
`.metadata` is unpickled into inert records by an allow-list and rebuilt from their checked values, byte entries are
refused but for those Megatron itself writes, and `common.pt` is read weights-only.
"""

import io
import itertools
import math
import pickle
from collections import Counter
from pathlib import Path
from typing import IO, Any, Never

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from nemo_opdlm.data.bounded import parse_json, read_bounded
from nemo_opdlm.megatron.pickle_guard import check_pickle, check_torch_file

METADATA = ".metadata"
COMMON = "common.pt"
CONFIG = "metadata.json"
#: Byte entry in which Megatron-core >= 0.19 keeps what older versions write to `common.pt`.
COMMON_ENTRY = "common_state/shard_0_1"
_MAX_CONFIG_BYTES = 2**20
_MAX_NAME = 500
#: Longest axis of a tensor without values, which claims nothing.
_LONGEST_EMPTY = 2**20
#: Axes that ranks share out between them: layers, rows or columns, experts.
_MOST_CUT_AXES = 6


class _Record:
    """Stands in for a class named in `.metadata`: it keeps what it is given and can do nothing."""

    def __new__(cls, *args: Any) -> "_Record":
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __init__(self, *args: Any) -> None:
        self.args: tuple[Any, ...]
        self.state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __hash__(self) -> int:
        # MetadataIndex is a dictionary key: a hash of the state cannot be had while it is being unpickled.
        return id(self)


_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_PLANNER_MODULE = "torch.distributed.checkpoint.planner"
_MEGATRON_MODULE = "megatron.core.dist_checkpointing.strategies.torch"
_NAMES = {
    _METADATA_MODULE: "Metadata TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata TensorProperties "
    "MetadataIndex StorageMeta _MEM_FORMAT_ENCODING",
    "torch.distributed.checkpoint.filesystem": "_StorageInfo _StoragePrefix",
    "torch.serialization": "_get_layout",
    "torch": "Size",
    # torch notes where it saved.
    "pathlib": "PosixPath WindowsPath PurePosixPath PureWindowsPath",
    "pathlib._local": "PosixPath WindowsPath PurePosixPath PureWindowsPath",
    # Megatron adds every rank's writing plan, which loading does not need.
    _PLANNER_MODULE: "SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData",
    _MEGATRON_MODULE: "MCoreMetadata MCoreSavePlan",
}
_STAND_INS = {(module, name): type(name, (_Record,), {}) for module, names in _NAMES.items() for name in names.split()}


class _AllowListUnpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        if (module_name, global_name) in _STAND_INS:
            return _STAND_INS[module_name, global_name]
        if module_name == "torch" and isinstance(getattr(torch, global_name, None), torch.dtype):
            return getattr(torch, global_name)
        raise pickle.UnpicklingError(f"it refers to {module_name}.{global_name}, which no checkpoint index needs")


def check(directory: str | Path) -> Metadata:
    """Make sure that a distributed checkpoint is whole and that loading it executes nothing.

    Returns:
        Its index, rebuilt from checked values: the only one to load it by.

    Raises:
        ValueError: one line that names the file and what is wrong with it.
    """
    directory = Path(directory)
    _check_config(directory)
    metadata = read_metadata(directory)
    load_common(directory, metadata)
    return metadata


def read_metadata(directory: str | Path) -> Metadata:
    """Read `.metadata`, and make sure that every entry lies within a file beside it.

    Raises:
        ValueError: it is missing, damaged, refers to anything but checkpoint metadata, or holds foreign byte entries.
    """
    path = Path(directory) / METADATA
    entries, storage = _read_entries(path)
    _check_byte_entries(path, entries, storage)
    _check_files(path, entries, storage)
    return Metadata(state_dict_metadata=entries, planner_data=None, storage_data=storage)


def read_tensor_index(directory: str | Path) -> Metadata:
    """The index of a checkpoint of which only tensors will be read: trainers store more, pickled, and none of it counts.

    Raises:
        ValueError: as `check`, but for byte entries and `common.pt`, which are left out.
    """
    directory = Path(directory)
    _check_config(directory)
    entries, storage = _read_entries(directory / METADATA)
    tensors = {key: entry for key, entry in entries.items() if isinstance(entry, TensorStorageMetadata)}
    storage = {index: info for index, info in storage.items() if index.fqn in tensors}
    _check_files(directory / METADATA, tensors, storage)
    return Metadata(state_dict_metadata=tensors, planner_data=None, storage_data=storage)  # type: ignore[arg-type]


def count_values(metadata: Metadata) -> int:
    """Values of all tensors of a checkpoint together."""
    entries = metadata.state_dict_metadata.values()
    return sum(math.prod(entry.size) for entry in entries if isinstance(entry, TensorStorageMetadata))


def load_weights_only(source: Path | IO[bytes], path: Path, *, mmap: bool = False) -> Any:
    """What torch saved, as long as it is made of plain containers, numbers and tensors.

    Args:
        source: file or stream.
        path: of the file, for messages.
        mmap: map the file instead of reading it.

    Raises:
        ValueError: it is damaged or would need more than plain data; nothing in it was executed.
    """
    try:
        check_torch_file(source)
        # Explicit, because the environment variable TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD changes the default.
        return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        _refuse(path, f"is refused: it holds more than plain data ({_weights_only_reason(error)})")
    except Exception as error:
        _refuse(path, f"is damaged ({type(error).__name__}: {_first_line(error)})")


def load_common(directory: str | Path, metadata: Metadata) -> dict[str, Any]:
    """Load what a checkpoint holds besides sharded tensors: plain containers, numbers and small tensors.

    Raises:
        ValueError: it is missing, damaged or would need more than plain data.
    """
    directory = Path(directory)
    path = directory / COMMON
    info = metadata.storage_data.get(MetadataIndex(COMMON_ENTRY))
    if path.is_file():
        source: Path | IO[bytes] = path
    elif info is not None:
        path = directory / info.relative_path
        with path.open("rb") as stream:
            stream.seek(info.offset)
            source = io.BytesIO(stream.read(info.length))
    else:
        _refuse(path, "is missing")
    loaded = load_weights_only(source, path)
    loaded = loaded[0] if isinstance(loaded, list) and len(loaded) == 1 else loaded
    if not isinstance(loaded, dict):
        _refuse(path, f"is damaged (it holds a {type(loaded).__name__} instead of a dictionary)")
    return loaded


def is_extra_state(key: str) -> bool:
    """Whether a byte entry is a module's `_extra_state` (Transformer Engine's; `None` for every other module)."""
    return key.split("/shard_")[0].endswith("_extra_state")


def _read_entries(path: Path) -> tuple[dict[str, Any], dict[MetadataIndex, _StorageInfo]]:
    try:
        content = path.read_bytes()
        check_pickle(io.BytesIO(content), len(content))
        record = _AllowListUnpickler(io.BytesIO(content)).load()
    except FileNotFoundError:
        _refuse(path, "is missing: the folder is no distributed checkpoint, or saving it was interrupted")
    except pickle.UnpicklingError as error:
        _refuse(path, f"is refused: {error}")
    except Exception as error:  # damaged pickles raise nearly anything
        _refuse(path, f"is damaged ({type(error).__name__}: {_first_line(error)})")
    try:
        entries = _fields(record, "Metadata", "MCoreMetadata")
        tensors = {_text(key): _entry(value) for key, value in entries["state_dict_metadata"].items()}
        storage = dict(_stored(index, info) for index, info in (entries["storage_data"] or {}).items())
    except Exception as error:  # any value may stand anywhere
        _refuse(path, f"is damaged ({_first_line(error)})")
    return tensors, storage


def _check_config(directory: Path) -> None:
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such checkpoint folder")
    path = directory / CONFIG
    try:
        config = parse_json(read_bounded(path, _MAX_CONFIG_BYTES))
    except FileNotFoundError:
        _refuse(path, "is missing: the folder is no distributed checkpoint, or saving it was interrupted")
    except ValueError as error:
        _refuse(path, f"is damaged ({_first_line(error)})")
    backend = config.get("sharded_backend") if isinstance(config, dict) else None
    if backend == "zarr":
        _refuse(path, "says zarr: this format left Megatron-core long ago; convert with a NeMo container of its time")
    if backend != "torch_dist" or config.get("sharded_backend_version", 1) != 1:
        _refuse(path, f"names the unknown format {str(backend)[:40]!r}; torch_dist version 1 can be read")


def _check_byte_entries(path: Path, tensors: dict[str, Any], storage: dict[MetadataIndex, _StorageInfo]) -> None:
    allowed = {key for key, entry in tensors.items() if not isinstance(entry, BytesStorageMetadata)}
    foreign = [key for key in tensors if key not in allowed and key != COMMON_ENTRY and not is_extra_state(key)]
    if foreign:
        _refuse(path, f"is refused: {foreign[0]!r} is a pickled object; only tensors and _extra_state are loaded")
    unknown = [index.fqn for index in storage if index.fqn not in tensors]
    if unknown:
        _refuse(path, f"is damaged ({unknown[0]!r} is stored but not described)")


def _check_files(path: Path, tensors: dict[str, Any], storage: dict[MetadataIndex, _StorageInfo]) -> None:
    sizes: dict[str, int] = {}
    for info in storage.values():
        name = info.relative_path
        if Path(name).name != name or name in ("", ".", ".."):
            _refuse(path, f"is refused: it points to {name!r} outside of its folder")
        file = path.parent / name
        if name not in sizes and not file.is_file():
            _refuse(file, "is missing, but the checkpoint needs it")
        sizes.setdefault(name, file.stat().st_size)
        if info.offset + info.length > sizes[name]:
            _refuse(file, f"is truncated: {sizes[name]} bytes, at least {info.offset + info.length} are needed")
    for key, entry in tensors.items():
        if isinstance(entry, TensorStorageMetadata):
            _check_chunks(path, key, entry, storage)


def _check_chunks(
    path: Path, key: str, entry: TensorStorageMetadata, storage: dict[MetadataIndex, _StorageInfo]
) -> None:
    """The parts of a tensor must lie in it, and be in the files as often as it claims: it will be allocated by its size."""
    itemsize, stored = entry.properties.dtype.itemsize, 0
    for chunk in entry.chunks:
        info = storage.get(MetadataIndex(key, chunk.offsets))
        if info is None:
            _refuse(path, f"is damaged (a part of {key!r} is nowhere stored)")
        ends = [start + size for start, size in zip(chunk.offsets, chunk.sizes, strict=False)]
        if not len(chunk.offsets) == len(chunk.sizes) == len(entry.size) or any(map(int.__gt__, ends, entry.size)):
            _refuse(path, f"is damaged (a part of {key!r} lies outside of it)")
        if math.prod(chunk.sizes) * itemsize > info.length:
            _refuse(path, f"is damaged (a part of {key!r} is larger than what is stored of it)")
        stored += math.prod(chunk.sizes)
    if math.prod(entry.size) > stored or max(entry.size, default=0) > max(stored, _LONGEST_EMPTY):
        _refuse(path, f"is damaged (of {math.prod(entry.size)} values of {key!r}, {stored} are stored)")
    if stored and not _is_tiled(entry):
        _refuse(path, f"is damaged (parts of {key!r} overlap)")


def _is_tiled(entry: TensorStorageMetadata) -> bool:
    """Whether the parts, all of which lie in the tensor, hold each of its values once: where they overlap, others are missing.

    How often a value is held is the sum of the signed corners of all parts up to it, as in a summed-area table. So the
    corners have to cancel, but for those of the whole.
    """
    cut = [axis for axis, size in enumerate(entry.size) if any(chunk.sizes[axis] != size for chunk in entry.chunks)]
    if len(cut) > _MOST_CUT_AXES:
        return False
    whole = ChunkStorageMetadata(offsets=torch.Size([0] * len(entry.size)), sizes=entry.size)
    corners: Counter[tuple[int, ...]] = Counter()
    for chunk, sign in ((whole, -1), *((chunk, 1) for chunk in entry.chunks)):
        for ends in itertools.product((0, 1), repeat=len(cut)):
            corner = (chunk.offsets[axis] + end * chunk.sizes[axis] for axis, end in zip(cut, ends, strict=True))
            corners[tuple(corner)] += sign * (-1) ** sum(ends)
    return not any(corners.values())


def _entry(record: Any) -> TensorStorageMetadata | BytesStorageMetadata:
    if _kind(record) == "BytesStorageMetadata":
        return BytesStorageMetadata()
    fields = _fields(record, "TensorStorageMetadata")
    dtype = _record(fields["properties"], "TensorProperties").state[0]
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a {type(dtype).__name__} is no dtype")
    chunks = [_fields(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]]
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=dtype),
        size=_size(fields["size"]),
        chunks=[ChunkStorageMetadata(offsets=_size(c["offsets"]), sizes=_size(c["sizes"])) for c in chunks],
    )


def _stored(index: Any, info: Any) -> tuple[MetadataIndex, _StorageInfo]:
    key, place = _fields(index, "MetadataIndex"), _fields(info, "_StorageInfo")
    if place.get("transform_descriptors"):
        raise ValueError("compressed entries are not read")
    offset = None if key.get("offset") is None else _size(key["offset"])
    stored = _StorageInfo(_text(place["relative_path"]), _integer(place["offset"]), _integer(place["length"]))
    return MetadataIndex(_text(key["fqn"]), offset), stored


def _kind(record: Any) -> str:
    return type(record).__name__ if isinstance(record, _Record) else ""


def _record(record: Any, *kinds: str) -> _Record:
    if _kind(record) not in kinds:
        raise ValueError(f"{kinds[0]} expected, found {type(record).__name__}")
    return record  # type: ignore[no-any-return]


def _fields(record: Any, *kinds: str) -> dict[str, Any]:
    state = _record(record, *kinds).state
    if not isinstance(state, dict):
        raise ValueError(f"{kinds[0]} without fields")
    return state


def _size(record: Any) -> torch.Size:
    (values,) = _record(record, "Size").args
    return torch.Size([_integer(value) for value in values])


def _integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(
            f"size or place expected, found {'another' if type(value) is int else 'a'} {type(value).__name__}"
        )
    return value


def _text(value: Any) -> str:
    if type(value) is not str or not value.isprintable() or len(value) > _MAX_NAME:
        raise ValueError(f"name expected, found {'another text' if type(value) is str else type(value).__name__}")
    return value


def _weights_only_reason(error: Exception) -> str:
    """The global that torch names in the middle of a page of advice."""
    lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "Unsupported" in line]
    return lines[0] if lines else _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _refuse(path: Path, problem: str) -> Never:
    raise ValueError(f"{path} {' '.join(problem.split())}")
