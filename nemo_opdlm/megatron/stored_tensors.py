"""Whole tensors of a distributed checkpoint, read one at a time by one process: no model, no groups, nothing but tensors."""

import io
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from nemo_opdlm.megatron.pickle_guard import is_stored
from nemo_opdlm.megatron.safe_metadata import load_weights_only, read_tensor_index


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of a `torch_dist` checkpoint, whatever layout wrote them.

    Attributes:
        directory: the checkpoint.
        index: its index, checked.
    """

    directory: Path
    index: Metadata

    @staticmethod
    def open(directory: str | Path) -> "StoredTensors":
        """Read and check the index.

        Raises:
            ValueError: the folder is no such checkpoint, damaged or unsafe; one line that names the file.
        """
        return StoredTensors(Path(directory), read_tensor_index(directory))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Key -> shape."""
        return {key: tuple(self._entry(key).size) for key in self.index.state_dict_metadata}

    def dtype(self, key: str) -> torch.dtype:
        """Type of one tensor."""
        dtype: torch.dtype = self._entry(key).properties.dtype
        return dtype

    def read(self, key: str, row: int | None = None) -> Tensor:
        """Read a tensor, or one row of its first axis without that axis (a layer of a stacked tensor).

        Raises:
            ValueError: a part of it is damaged or nowhere stored.
        """
        entry = self._entry(key)
        first, last = (0, entry.size[0]) if row is None else (row, row + 1)
        whole = torch.zeros((last - first, *entry.size[1:]), dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            start, end = max(first, chunk.offsets[0]), min(last, chunk.offsets[0] + chunk.sizes[0])
            if start >= end:
                continue
            part = self._read_chunk(key, chunk)[start - chunk.offsets[0] : end - chunk.offsets[0]]
            others = zip(chunk.offsets[1:], chunk.sizes[1:], strict=True)
            place = (slice(start - first, end - first), *(slice(offset, offset + size) for offset, size in others))
            whole[place] = part
        return whole if row is None else whole[0]

    def _entry(self, key: str) -> TensorStorageMetadata:
        entry = self.index.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        return entry

    def _read_chunk(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self.index.storage_data[MetadataIndex(key, chunk.offsets)]
        path = self.directory / info.relative_path
        with path.open("rb") as stream:
            stream.seek(info.offset)
            content = io.BytesIO(stream.read(info.length))
        tensor = load_weights_only(content, path)
        if not isinstance(tensor, Tensor) or tensor.shape != chunk.sizes or not is_stored(tensor):
            raise ValueError(f"{path} is damaged: it does not hold the part of {key} that the index promises")
        return tensor
