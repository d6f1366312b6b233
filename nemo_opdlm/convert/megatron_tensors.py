"""Weights of Megatron models as others store them, seen as whole tensors under our names (`convert/families.py`)."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from nemo_opdlm.convert.families import OUTPUT_LAYER, RECOMPUTED_SUFFIXES, WORD_EMBEDDINGS, Shape
from nemo_opdlm.megatron.layer_names import own_name
from nemo_opdlm.megatron.stored_tensors import StoredTensors

# What trainers wrap the network in: NeMo 1.x without and with megatron_amp_O2, NeMo 2.0, Megatron-Bridge.
_PREFIXES = ("model.", "model.module.", "module.", "")
_NO_WEIGHTS = ("optimizer.", "chained_")
# A distributed checkpoint stacks the layers of a tensor, without a number in the name, unless asked not to.
_STACKED, _LAYERS = re.compile(r"decoder\.layers\.(?!\d)"), "decoder.layers."
# The axis that tensor parallelism cuts. Every other tensor is the same on all ranks.
_CUT_AXIS = {
    WORD_EMBEDDINGS: 0,
    OUTPUT_LAYER: 0,
    "self_attention.linear_qkv.weight": 0,
    "self_attention.linear_qkv.bias": 0,
    "self_attention.linear_proj.weight": 1,
    "mlp.linear_fc1.weight": 0,
    "mlp.linear_fc1.bias": 0,
    "mlp.linear_fc2.weight": 1,
}


class WholeTensors(Protocol):
    """The tensors of a model, without parallelism, each read when it is asked for."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Our name -> shape."""
        ...

    @property
    def dtypes(self) -> Mapping[str, torch.dtype]:
        """Our name -> type."""
        ...

    def read(self, name: str) -> Tensor:
        """One tensor."""
        ...


def weight_prefix(keys: Iterable[str], where: str) -> str:
    """What the keys of weights begin with.

    Raises:
        ValueError: no key is Megatron-core's embedding, so that these are no weights of a Megatron-core GPT.
    """
    keys = sorted(key for key in keys if not key.startswith(_NO_WEIGHTS))
    for prefix in _PREFIXES:
        if prefix + WORD_EMBEDDINGS in keys:
            return prefix
    found = f"it has tensors such as {keys[0]}" if keys else "it has no tensors"
    raise ValueError(f"{where} holds no Megatron-core GPT: tensor {WORD_EMBEDDINGS} is missing, {found}")


def own_names(keys: Iterable[str], prefix: str) -> dict[str, str]:
    """Key without its prefix, fused norms under their own names -> key, for the keys that are weights."""
    left_out = ("_extra_state", *RECOMPUTED_SUFFIXES)
    found = [key for key in keys if key.startswith(prefix) and not key.startswith(_NO_WEIGHTS)]
    return {own_name(key.removeprefix(prefix)): key for key in found if not key.endswith(left_out)}


@dataclass(frozen=True)
class DistributedWeights:
    """The weights in a distributed checkpoint of any layout.

    Attributes:
        stored: its tensors.
        parts: our name -> (key, row of a stacked tensor or None) of what, one over the other, is the tensor.
    """

    stored: StoredTensors
    parts: Mapping[str, tuple[tuple[str, int | None], ...]]

    @staticmethod
    def open(folder: Path, num_layers: int) -> "DistributedWeights":
        """Read and check the index of a checkpoint.

        Args:
            folder: the checkpoint.
            num_layers: of the model, which a stacked tensor must have.

        Raises:
            ValueError: it is damaged, unsafe or holds no such Megatron-core GPT; one line that names file or tensor.
        """
        stored = StoredTensors.open(folder)
        shapes = stored.shapes
        parts: dict[str, tuple[tuple[str, int | None], ...]] = {}
        for name, key in sorted(own_names(shapes, weight_prefix(shapes, str(folder))).items()):
            # Newer Megatron can store gate and up apart, as `weight_w` and `weight_v`; ours is gate over up.
            whole = re.sub(r"(linear_fc1\.(weight|bias))_[vw]$", r"\1", name)
            if not _STACKED.match(whole):
                parts[whole] = ((key, None), *parts.get(whole, ()))
                continue
            if shapes[key][:1] != (num_layers,):
                raise ValueError(
                    f"{folder}: tensor {key} of shape {list(shapes[key])} is not one of num_layers={num_layers}"
                )
            for layer in range(num_layers):
                layer_name = _STACKED.sub(f"{_LAYERS}{layer}.", whole)
                parts[layer_name] = ((key, layer), *parts.get(layer_name, ()))
        return DistributedWeights(stored, parts)

    @property
    def shapes(self) -> dict[str, Shape]:
        """Our name -> shape."""
        stored, shapes = self.stored.shapes, {}
        for name, parts in self.parts.items():
            each = [stored[key] if row is None else stored[key][1:] for key, row in parts]
            shapes[name] = (sum(shape[0] for shape in each), *each[0][1:]) if len(each) > 1 else each[0]
        return shapes

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Our name -> type."""
        return {name: self.stored.dtype(parts[0][0]) for name, parts in self.parts.items()}

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            ValueError: it is damaged.
        """
        read = [self.stored.read(key, row) for key, row in self.parts[name]]
        return torch.cat(read) if len(read) > 1 else read[0]


def cut_axis(name: str) -> int | None:
    """The axis along which tensor parallelism cuts one of our tensors; None where every rank holds all of it."""
    return next((axis for suffix, axis in _CUT_AXIS.items() if name.endswith(suffix)), None)


def join_shards(name: str, shards: list[Tensor]) -> Tensor:
    """One tensor from the shards of all tensor-parallel ranks, which are alike in shape."""
    axis = cut_axis(name)
    if axis is None or len(shards) == 1:
        return shards[0]
    if ".linear_fc1." in name:
        # Every rank holds its slice of the gate over its slice of up.
        halves = [shard.chunk(2) for shard in shards]
        return torch.cat([half[i] for i in range(2) for half in halves])
    return torch.cat(shards, dim=axis)
