"""Hugging Face tensor names <-> Megatron-core tensor names: one declarative table per model family.

A row says "these Hugging Face tensors, fused this way, are that Megatron tensor". Both directions, the expected shapes
and the list of missing or unexpected tensors are all read from the same rows, so they cannot disagree. To add a family,
write its rows; nothing else in this package knows tensor names.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opdlm.config import Architecture
from nemo_opdlm.data.shown import plain

Shape = tuple[int, ...]
Condition = Callable[[Architecture], bool]

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
OUTPUT_LAYER = "output_layer.weight"
# Frequencies are recomputed from the config; old Llama checkpoints still carry them.
RECOMPUTED_SUFFIXES = ("rotary_emb.inv_freq",)


@dataclass(frozen=True)
class Transform:
    """A reversible way to make one Megatron tensor of several Hugging Face tensors.

    Attributes:
        fuse: tensors in table order -> the Megatron tensor.
        split: the Megatron tensor -> contiguous tensors in table order.
    """

    fuse: Callable[[Sequence[Tensor], Architecture], Tensor]
    split: Callable[[Tensor, Architecture], list[Tensor]]


def fuse_qkv(parts: Sequence[Tensor], arch: Architecture) -> Tensor:
    """Interleave q, k, v per key/value group: the group's query heads, then its key, then its value.

    Shapes: q [heads * dim, ...], k and v [groups * dim, ...] -> [(heads + 2 groups) * dim, ...]; weights and biases.
    """
    groups, dim = arch.num_query_groups, arch.kv_channels
    rest = parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, dim, *rest) for part in parts], dim=1).reshape(-1, *rest)


def split_qkv(fused: Tensor, arch: Architecture) -> list[Tensor]:
    """Inverse of `fuse_qkv`."""
    groups, dim, rest = arch.num_query_groups, arch.kv_channels, fused.shape[1:]
    queries = arch.num_attention_heads // groups
    grouped = fused.reshape(groups, queries + 2, dim, *rest)
    parts = (grouped[:, :queries], grouped[:, queries], grouped[:, queries + 1])
    return [part.reshape(-1, *rest).contiguous() for part in parts]


def fuse_gate_up(parts: Sequence[Tensor], arch: Architecture) -> Tensor:
    """Stack gate over up; Megatron's own sharding cuts both halves for tensor parallelism."""
    return torch.cat(list(parts))


def split_gate_up(fused: Tensor, arch: Architecture) -> list[Tensor]:
    """Inverse of `fuse_gate_up`."""
    return [half.contiguous() for half in fused.chunk(2)]


def _only(parts: Sequence[Tensor], arch: Architecture) -> Tensor:
    return parts[0]


def _as_it_is(fused: Tensor, arch: Architecture) -> list[Tensor]:
    return [fused]


# Named functions, because a table that one rank sends to another is pickled.
COPY = Transform(fuse=_only, split=_as_it_is)
QKV = Transform(fuse=fuse_qkv, split=split_qkv)
GATE_UP = Transform(fuse=fuse_gate_up, split=split_gate_up)


def _always(arch: Architecture) -> bool:
    return True


def _has_qkv_bias(arch: Architecture) -> bool:
    return arch.qkv_bias or arch.bias


def _has_bias(arch: Architecture) -> bool:
    return arch.bias


def _has_own_head(arch: Architecture) -> bool:
    return not arch.share_embeddings_and_output_weights


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        megatron: Megatron name; `{n}` is the layer number.
        hugging_face: (name, symbolic shape) of each part, in the transform's order. Symbols: see `symbol_sizes`.
        transform: how the parts become the Megatron tensor.
        when: whether a model of this architecture has the row at all.
    """

    megatron: str
    hugging_face: tuple[tuple[str, tuple[str, ...]], ...]
    transform: Transform = COPY
    when: Condition = _always


LAYER = "model.layers.{n}."
MEGATRON_LAYER = "decoder.layers.{n}."


def _copy(megatron: str, hugging_face: str, *shape: str, when: Condition = _always) -> Row:
    return Row(MEGATRON_LAYER + megatron, ((LAYER + hugging_face, shape),), when=when)


def _fused(megatron: str, suffix: str, shapes: Mapping[str, tuple[str, ...]], how: Transform, when: Condition) -> Row:
    parts = tuple((f"{LAYER}{name}.{suffix}", shape) for name, shape in shapes.items())
    return Row(f"{MEGATRON_LAYER}{megatron}.{suffix}", parts, how, when)


def _qkv(suffix: str, *rest: str, when: Condition = _always) -> Row:
    shapes = {f"self_attn.{name}_proj": (size, *rest) for name, size in (("q", "q"), ("k", "kv"), ("v", "kv"))}
    return _fused("self_attention.linear_qkv", suffix, shapes, QKV, when)


def _gate_up(suffix: str, *rest: str, when: Condition = _always) -> Row:
    shapes = {f"mlp.{name}_proj": ("ffn", *rest) for name in ("gate", "up")}
    return _fused("mlp.linear_fc1", suffix, shapes, GATE_UP, when)


_LAYER_ROWS = (
    _copy("input_layernorm.weight", "input_layernorm.weight", "hidden"),
    _qkv("weight", "hidden"),
    _copy("self_attention.linear_proj.weight", "self_attn.o_proj.weight", "hidden", "q"),
    _copy("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", "hidden"),
    _gate_up("weight", "hidden"),
    _copy("mlp.linear_fc2.weight", "mlp.down_proj.weight", "hidden", "ffn"),
)
_QKV_BIAS_ROWS = (_qkv("bias", when=_has_qkv_bias),)
_BIAS_ROWS = (
    _copy("self_attention.linear_proj.bias", "self_attn.o_proj.bias", "hidden", when=_has_bias),
    _gate_up("bias", when=_has_bias),
    _copy("mlp.linear_fc2.bias", "mlp.down_proj.bias", "hidden", when=_has_bias),
)
_QK_NORM_ROWS = (
    _copy("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", "dim"),
    _copy("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", "dim"),
)


@dataclass(frozen=True)
class Family:
    """The table of one model family.

    Attributes:
        layers: rows repeated for every layer.
        first: rows before the layers.
        last: rows after the layers.
    """

    layers: tuple[Row, ...]
    first: tuple[Row, ...] = (Row(WORD_EMBEDDINGS, ((EMBEDDING, ("vocab", "hidden")),)),)
    last: tuple[Row, ...] = (
        Row("decoder.final_layernorm.weight", (("model.norm.weight", ("hidden",)),)),
        Row(OUTPUT_LAYER, ((LM_HEAD, ("vocab", "hidden")),), when=_has_own_head),
    )


FAMILIES: Mapping[str, Family] = {
    "llama": Family((*_LAYER_ROWS, *_QKV_BIAS_ROWS, *_BIAS_ROWS)),
    "qwen2": Family((*_LAYER_ROWS, *_QKV_BIAS_ROWS)),
    "qwen3": Family((*_LAYER_ROWS, *_QK_NORM_ROWS)),
}


@dataclass(frozen=True)
class Entry:
    """A row for one concrete layer of one concrete model: names filled in, shapes in numbers."""

    megatron: str
    megatron_shape: Shape
    hugging_face: tuple[str, ...]
    hugging_face_shapes: tuple[Shape, ...]
    transform: Transform


def symbol_sizes(arch: Architecture) -> dict[str, int]:
    """The sizes behind the symbolic shapes of the tables."""
    return {
        "vocab": arch.vocab_size,
        "hidden": arch.hidden_size,
        "ffn": arch.ffn_hidden_size,
        "q": arch.num_attention_heads * arch.kv_channels,
        "kv": arch.num_query_groups * arch.kv_channels,
        "dim": arch.kv_channels,
    }


def entries(family: str, arch: Architecture) -> list[Entry]:
    """Every tensor of a model, in file order: embedding, layers from the first to the last, final norm, head."""
    sizes, table = symbol_sizes(arch), FAMILIES[family]
    rows = [(row, 0) for row in table.first]
    rows += [(row, n) for n in range(arch.num_layers) for row in table.layers]
    rows += [(row, 0) for row in table.last]
    return [_entry(row, n, sizes) for row, n in rows if row.when(arch)]


def _entry(row: Row, n: int, sizes: Mapping[str, int]) -> Entry:
    shapes = tuple(tuple(sizes[symbol] for symbol in symbols) for _, symbols in row.hugging_face)
    # Every transform stacks rows, so the fused tensor is as tall as its parts together.
    fused = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    names = tuple(name.format(n=n) for name, _ in row.hugging_face)
    return Entry(row.megatron.format(n=n), fused, names, shapes, row.transform)


def check_depth(arch: Architecture, num_tensors: int, where: str) -> None:
    """Check that there can be as many layers as the config says, before a table of them all is made.

    Raises:
        ValueError: there are more layers than tensors.
    """
    if arch.num_layers > num_tensors:
        raise ValueError(f"{where}: {num_tensors} tensors cannot be the {arch.num_layers} layers that the config says")


def check_names_and_shapes(expected: Mapping[str, Shape], found: Mapping[str, Shape], where: str) -> None:
    """Check that `found` holds exactly the expected tensors.

    Raises:
        ValueError: one line naming the first missing, unexpected or wrongly shaped tensor.
    """
    for name, shape in expected.items():
        if name not in found:
            raise ValueError(f"{where}: tensor {name} of shape {list(shape)} is missing")
        if tuple(found[name]) != shape:
            raise ValueError(f"{where}: tensor {name} has shape {list(found[name])}, the config says {list(shape)}")
    unexpected = sorted(name for name in found if name not in expected and not name.endswith(RECOMPUTED_SUFFIXES))
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise ValueError(f"{where}: unexpected tensor {plain(unexpected[0])}{more}; this model family does not have it")


def hugging_face_shapes(family: str, arch: Architecture) -> dict[str, Shape]:
    """Hugging Face tensor name -> shape."""
    return {
        name: shape
        for entry in entries(family, arch)
        for name, shape in zip(entry.hugging_face, entry.hugging_face_shapes, strict=True)
    }


def megatron_shapes(family: str, arch: Architecture) -> dict[str, Shape]:
    """Megatron tensor name -> shape, at tensor-parallel size 1."""
    return {entry.megatron: entry.megatron_shape for entry in entries(family, arch)}


def to_megatron(tensor: Callable[[str], Tensor], family: str, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Stream (Megatron name, tensor) pairs; `tensor` reads one Hugging Face tensor, already checked."""
    for entry in entries(family, arch):
        yield entry.megatron, entry.transform.fuse([tensor(name) for name in entry.hugging_face], arch)


def to_hugging_face(tensor: Callable[[str], Tensor], family: str, arch: Architecture) -> Iterator[tuple[str, Tensor]]:
    """Stream (Hugging Face name, tensor) pairs: the exact inverse of `to_megatron`."""
    for entry in entries(family, arch):
        yield from zip(entry.hugging_face, entry.transform.split(tensor(entry.megatron), arch), strict=True)
