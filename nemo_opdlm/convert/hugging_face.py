"""One call per direction: a Hugging Face folder -> Megatron weights, and Megatron weights -> a Hugging Face folder."""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_opdlm.config import Architecture
from nemo_opdlm.convert import families
from nemo_opdlm.convert.families import EMBEDDING, LM_HEAD, OUTPUT_LAYER, WORD_EMBEDDINGS, Shape
from nemo_opdlm.convert.hf_config import read_architecture, write_config
from nemo_opdlm.convert.hf_folder import GENERATION_CONFIG, MAX_SHARD_SIZE, HfFolder, load_hf_folder, save_hf_folder
from nemo_opdlm.convert.lazy_tensors import LazyTensors
from nemo_opdlm.convert.mask_token import MaskToken, append_mask_row, choose_mask_token
from nemo_opdlm.convert.setting_values import count, section, switch, token_ids
from nemo_opdlm.convert.tokenizer_files import register_mask_token, unregister_mask_token
from nemo_opdlm.data.shown import shown

_ROLES = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class HfOrigin:
    """What a `.nemo` archive must remember of the folder it came from; plain values, `asdict` is its stored form.

    Attributes:
        family: `llama`, `qwen2` or `qwen3`.
        dtype: torch name of the weights' type.
        mask_token, mask_token_id: the mask token.
        added_rows: vocabulary rows that the source did not have (1 for an added mask row).
        mlp_bias: Llama with biases: whether the source had them in the feed-forward layers too.
        block_size: block size declared by an SDAR folder, None elsewhere.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id` of the source's config, where set.
        generation_config: the source's generation defaults.
    """

    family: str
    dtype: str
    mask_token: str
    mask_token_id: int
    added_rows: int = 0
    mlp_bias: bool = False
    block_size: int | None = None
    token_ids: dict[str, Any] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a YAML file; `read_origin` reads them back."""
        return asdict(self)


def read_origin(values: Mapping[str, Any]) -> HfOrigin:
    """The origin that an archive remembers.

    Args:
        values: its stored form.

    Raises:
        ValueError: something is missing or is not what it must be; one line that names it.
    """
    known = {field.name for field in fields(HfOrigin)}
    unknown = next((key for key in values if key not in known), None)
    if unknown is not None:
        raise ValueError(f"origin.{shown(unknown)} is not known")
    for key in ("family", "dtype", "mask_token"):
        if not isinstance(values.get(key), str):
            raise ValueError(f"origin.{key}={shown(values.get(key))} must be a text")
    if values["family"] not in families.FAMILIES:
        raise ValueError(f"origin.family={shown(values['family'])} is none of {', '.join(families.FAMILIES)}")
    if len(token_ids(values, "mask_token_id")) != 1 or values.get("added_rows", 0) not in (0, 1):
        raise ValueError("origin.mask_token_id must be a token id, and added_rows 0 or 1")
    if values.get("block_size") is not None:
        count("origin.block_size", values["block_size"])
    switch("origin.mlp_bias", values.get("mlp_bias", False))
    for role in _ROLES:
        token_ids(section(values, "token_ids"), role)
    section(values, "generation_config")
    return HfOrigin(**values)


@dataclass(frozen=True)
class HfImport:
    """A model of another format, ready to become a `.nemo` archive.

    Attributes:
        architecture: the network's shape; `vocab_size` counts an added mask row.
        origin: what an export to Hugging Face needs to know.
        state_dict: Megatron name -> tensor at tensor-parallel size 1, all of one type.
        tokenizer_files: file name -> content, the mask token registered.
    """

    architecture: Architecture
    origin: HfOrigin
    state_dict: Mapping[str, Tensor] = field(repr=False)
    tokenizer_files: dict[str, bytes] = field(repr=False)


def hf_to_megatron(path: str | Path, mask_token: str | None = None, dtype: torch.dtype | None = None) -> HfImport:
    """Convert a Hugging Face folder in memory: `open_hugging_face` with every tensor read."""
    imported = open_hugging_face(path, mask_token, dtype)
    return replace(imported, state_dict=dict(imported.state_dict))


def open_hugging_face(
    path: str | Path,
    mask_token: str | None = None,
    dtype: torch.dtype | None = None,
    tokenizer: str | Path | None = None,
) -> HfImport:
    """Open a Hugging Face folder as a Megatron model; tensors are read when they are asked for, after all checks.

    Args:
        path: a local folder of a Llama, Qwen2, Qwen3 or SDAR model.
        mask_token: the token that stands for "masked"; None chooses one (see `choose_mask_token`).
        dtype: type of the weights; None keeps the source's (the widest one, should it mix types).
        tokenizer: folder of the tokenizer; None = the model's.

    Raises:
        ValueError: one line naming what is missing, unknown or contradictory.
    """
    folder = load_hf_folder(path, tokenizer)
    try:
        architecture, family = read_architecture(folder.config)
    except ValueError as error:
        raise ValueError(f"{folder.path / 'config.json'}: {error}") from error
    families.check_depth(architecture, len(folder.shapes), str(folder.path))
    architecture, shapes = _settle_head(folder, architecture)
    expected = families.hugging_face_shapes(family, architecture)
    optional = _absent_mlp_biases(folder, expected)
    required = {name: shape for name, shape in expected.items() if name not in optional}
    families.check_names_and_shapes(required, shapes, str(folder.path))
    target = dtype or functools.reduce(torch.promote_types, (folder.dtypes[name] for name in required))
    try:
        mask = choose_mask_token(
            folder.tokenizer_files, family, architecture.vocab_size, folder.config, folder.generation_config, mask_token
        )
        files = register_mask_token(folder.tokenizer_files, mask.token, mask.token_id)
        origin = _origin(folder, family, target, mask)
    except ValueError as error:
        raise ValueError(f"{folder.path}: {error}") from error
    reader = _FusedTensors(folder, family, architecture, frozenset(optional), target, mask.added_rows)
    state_dict = LazyTensors(families.megatron_shapes(family, architecture), reader.read)
    architecture = replace(architecture, vocab_size=architecture.vocab_size + mask.added_rows)
    return HfImport(architecture, origin, state_dict, files)


@dataclass(frozen=True)
class _FusedTensors:
    """Megatron's tensors, each fused from the folder's when it is asked for; absent ones are zeros."""

    folder: HfFolder
    family: str
    architecture: Architecture
    absent: frozenset[str]
    dtype: torch.dtype
    added_rows: int

    def read(self, name: str) -> Tensor:
        entry = self._entries[name]
        parts = [self._part(*part) for part in zip(entry.hugging_face, entry.hugging_face_shapes, strict=True)]
        tensor = entry.transform.fuse(parts, self.architecture)
        return append_mask_row(tensor, self.added_rows) if name in (WORD_EMBEDDINGS, OUTPUT_LAYER) else tensor

    def _part(self, name: str, shape: Shape) -> Tensor:
        return torch.zeros(shape, dtype=self.dtype) if name in self.absent else self.folder.tensor(name).to(self.dtype)

    @functools.cached_property
    def _entries(self) -> dict[str, families.Entry]:
        return {entry.megatron: entry for entry in families.entries(self.family, self.architecture)}


def megatron_to_hf(
    state_dict: Mapping[str, Tensor],
    architecture: Architecture,
    origin: HfOrigin,
    tokenizer_files: Mapping[str, bytes],
    output: str | Path,
    *,
    block_size: int | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write Megatron weights as a Hugging Face folder of the source's family; an added mask row is stripped again.

    Args:
        state_dict: Megatron name -> tensor at tensor-parallel size 1.
        architecture: of the state dict.
        origin: from the import.
        tokenizer_files: from the import.
        output: folder to create.
        block_size: that a student was trained for, for those who read the folder again; None = not worth a word.
        dtype: type of the written weights; None keeps each tensor's own, which makes the round trip bit-exact.
        max_shard_size: bytes per weights file.

    Raises:
        ValueError: `output` exists, or the weights do not fit the architecture.
    """
    weights = HfWeights(state_dict, architecture, origin, dtype)
    if origin.added_rows:
        tokenizer_files = unregister_mask_token(tokenizer_files, origin.mask_token, origin.mask_token_id)
    config = write_config(weights.architecture, origin.family, weights.dtype_name, weights.has_mlp_bias)
    save_hf_folder(
        output,
        weights.stream(),
        weights.nbytes(),
        {
            "config.json": config | origin.token_ids | ({} if block_size is None else {"block_size": block_size}),
            GENERATION_CONFIG: origin.generation_config or origin.token_ids,
            **tokenizer_files,
        },
        max_shard_size,
    )


class HfWeights:
    """Megatron weights seen as Hugging Face tensors; nothing is copied until it is streamed.

    Attributes:
        architecture: of the Hugging Face model, without added rows.
        has_mlp_bias: whether feed-forward biases are written.

    Raises:
        ValueError: a weight is missing, unexpected or of the wrong shape.
    """

    def __init__(
        self,
        state_dict: Mapping[str, Tensor],
        architecture: Architecture,
        origin: HfOrigin,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Check names and shapes."""
        # Transformer Engine keeps FP8 scales in entries of their own; they are no weights.
        weights = {name: value for name, value in state_dict.items() if not name.endswith("_extra_state")}
        self._state = {name: _without_padding(name, value, architecture) for name, value in weights.items()}
        found = {name: tuple(value.shape) for name, value in self._state.items()}
        families.check_names_and_shapes(families.megatron_shapes(origin.family, architecture), found, "model weights")
        self.architecture = replace(architecture, vocab_size=architecture.vocab_size - origin.added_rows)
        self.has_mlp_bias = architecture.bias and (origin.mlp_bias or self._has_trained_mlp_bias())
        self._family, self._dtype = origin.family, dtype

    @property
    def dtype_name(self) -> str:
        """Torch name of the written type."""
        return str(self._dtype or self._state[WORD_EMBEDDINGS].dtype).removeprefix("torch.")

    def nbytes(self) -> dict[str, int]:
        """Name -> bytes, in the order of `stream`."""
        shapes = families.hugging_face_shapes(self._family, self.architecture)
        sizes = {}
        for entry in families.entries(self._family, self.architecture):
            itemsize = (self._dtype or self._state[entry.megatron].dtype).itemsize
            for name in filter(self._is_written, entry.hugging_face):
                sizes[name] = itemsize * torch.Size(shapes[name]).numel()
        return sizes

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (Hugging Face name, tensor) in file order."""
        for name, tensor in families.to_hugging_face(self._read, self._family, self.architecture):
            if self._is_written(name):
                yield name, tensor.to(self._dtype or tensor.dtype)

    def _read(self, name: str) -> Tensor:
        tensor = self._state[name]
        return tensor[: self.architecture.vocab_size] if name in (WORD_EMBEDDINGS, OUTPUT_LAYER) else tensor

    def _is_written(self, name: str) -> bool:
        return self.has_mlp_bias or not _is_mlp_bias(name)

    def _has_trained_mlp_bias(self) -> bool:
        """Megatron has biases on all layers or none: those the source lacked start, and may have stayed, at zero."""
        return any(bool(value.any()) for name, value in self._state.items() if _is_mlp_bias(name))


def _without_padding(name: str, tensor: Tensor, architecture: Architecture) -> Tensor:
    """A weight of a whole network, whose embedding and head may be padded."""
    is_padded = name in (WORD_EMBEDDINGS, OUTPUT_LAYER) and tensor.shape[:1] == (architecture.padded_vocab_size(1),)
    return tensor[: architecture.vocab_size] if is_padded else tensor


def _is_mlp_bias(name: str) -> bool:
    return ".mlp." in name and name.endswith(".bias")


def _absent_mlp_biases(folder: HfFolder, expected: Mapping[str, Shape]) -> set[str]:
    """Llama with attention_bias alone: Megatron's feed-forward biases start at zero, which is exact."""
    return set() if folder.config.get("mlp_bias") else {name for name in expected if _is_mlp_bias(name)}


def _settle_head(folder: HfFolder, architecture: Architecture) -> tuple[Architecture, dict[str, Shape]]:
    """Drop a head that repeats the embedding: always in a tied model; in an SDAR folder, that is how tied models come.

    Returns:
        The architecture, tied if the head was dropped, and the tensors' shapes without a dropped head.
    """
    shapes = dict(folder.shapes)
    tied = architecture.share_embeddings_and_output_weights
    is_sdar = folder.config["architectures"] == ["SDARForCausalLM"]
    if not {LM_HEAD, EMBEDDING} <= shapes.keys() or not (tied or is_sdar):
        return architecture, shapes
    if torch.equal(folder.tensor(LM_HEAD), folder.tensor(EMBEDDING)):
        del shapes[LM_HEAD]
        return replace(architecture, share_embeddings_and_output_weights=True), shapes
    if tied:
        raise ValueError(f"{folder.path}: tie_word_embeddings is true, but {LM_HEAD} differs from {EMBEDDING}")
    return architecture, shapes


def _origin(folder: HfFolder, family: str, dtype: torch.dtype, mask: MaskToken) -> HfOrigin:
    block_size = folder.config.get("block_size")
    for role in _ROLES:
        token_ids(folder.config, role)
    return HfOrigin(
        family=family,
        dtype=str(dtype).removeprefix("torch."),
        mask_token=mask.token,
        mask_token_id=mask.token_id,
        added_rows=mask.added_rows,
        mlp_bias=bool(folder.config.get("mlp_bias")),
        block_size=None if block_size is None else count("block_size", block_size),
        token_ids={role: folder.config[role] for role in _ROLES if folder.config.get(role) is not None},
        generation_config=folder.generation_config,
    )
