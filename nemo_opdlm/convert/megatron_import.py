"""A model that NeMo or Megatron-Bridge trained -> a model ready to become a `.nemo` archive of ours."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from nemo_opdlm.config import Architecture
from nemo_opdlm.convert import families
from nemo_opdlm.convert.families import OUTPUT_LAYER, WORD_EMBEDDINGS, Shape
from nemo_opdlm.convert.hugging_face import HfImport, HfOrigin
from nemo_opdlm.convert.lazy_tensors import LazyTensors
from nemo_opdlm.convert.mask_token import MaskToken, append_mask_row, choose_mask_token
from nemo_opdlm.convert.megatron_config import Dialect, Settings, family_of, read_network, true_vocab_size
from nemo_opdlm.convert.megatron_tensors import WholeTensors
from nemo_opdlm.convert.tokenizer_files import TokenizerFacts, read_facts, register_mask_token

_VOCABULARY = (WORD_EMBEDDINGS, OUTPUT_LAYER)
_ROLES = ("bos_token", "eos_token", "pad_token")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class MegatronModel:
    """What was found of such a model.

    Attributes:
        source: where, for messages.
        settings_file: where its settings stand, for messages.
        settings: of the model, plain data.
        dialect: whose settings they are.
        open_weights: finds its tensors; is told the number of layers.
        tokenizer_files: file name -> content.
        generation_config: generation defaults, in which chat models name further end tokens.
    """

    source: str
    settings_file: str
    settings: Settings
    dialect: Dialect
    open_weights: Callable[[int], WholeTensors]
    tokenizer_files: Mapping[str, bytes]
    generation_config: Mapping[str, Any] = field(default_factory=dict)


def import_megatron(model: MegatronModel, mask_token: str | None = None, dtype: torch.dtype | None = None) -> HfImport:
    """Check such a model against its settings and choose its mask token; tensors are read when they are asked for.

    Args:
        model: what was found.
        mask_token: the token that stands for "masked"; None chooses one (see `choose_mask_token`).
        dtype: type of the weights; None keeps the source's (the widest one, should it mix types).

    Raises:
        ValueError: one line that names file and setting or tensor.
    """
    with _naming(model.source):
        facts = read_facts(model.tokenizer_files)
    with _naming(model.settings_file):
        network = read_network(model.settings, model.dialect)
        family = family_of(network)
    weights = model.open_weights(network.num_layers)
    with _naming(model.settings_file):
        rows = next(iter(weights.shapes[WORD_EMBEDDINGS]), 0)
        vocab_size = true_vocab_size(model.settings, rows, max(facts.ids.values()) + 1)
    architecture = replace(network, vocab_size=vocab_size)
    families.check_depth(architecture, len(weights.shapes), model.source)
    expected = families.megatron_shapes(family, architecture)
    families.check_names_and_shapes(expected, _shapes(model, weights, architecture), model.source)
    with _naming(model.source):
        mask = choose_mask_token(model.tokenizer_files, family, vocab_size, {}, model.generation_config, mask_token)
        tokenizer_files = register_mask_token(model.tokenizer_files, mask.token, mask.token_id)
    target = dtype or _stored_dtype(model.source, weights.dtypes, expected)
    reader = _TrueRows(weights, vocab_size, mask.added_rows, target)
    return HfImport(
        replace(architecture, vocab_size=vocab_size + mask.added_rows),
        _origin(model, family, architecture, target, mask, facts),
        LazyTensors(expected, reader.read),
        tokenizer_files,
    )


@dataclass(frozen=True)
class _TrueRows:
    """Tensors of one type, without the rows that padded the vocabulary and with the added mask row."""

    weights: WholeTensors
    vocab_size: int
    added_rows: int
    dtype: torch.dtype

    def read(self, name: str) -> Tensor:
        tensor = self.weights.read(name).to(self.dtype)
        return append_mask_row(tensor[: self.vocab_size], self.added_rows) if name in _VOCABULARY else tensor


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """Let errors about settings name where they stand."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def _shapes(model: MegatronModel, weights: WholeTensors, architecture: Architecture) -> dict[str, Shape]:
    """Shapes as found, without padding of the vocabulary and without a head that repeats the embedding.

    The last pipeline stage of a tied model keeps a copy of the embedding under the head's name.
    """
    shapes, vocab_size = dict(weights.shapes), architecture.vocab_size
    if architecture.share_embeddings_and_output_weights and OUTPUT_LAYER in shapes:
        if not torch.equal(weights.read(OUTPUT_LAYER), weights.read(WORD_EMBEDDINGS)):
            raise ValueError(
                f"{model.source}: {OUTPUT_LAYER} differs from {WORD_EMBEDDINGS}, although {model.settings_file} says "
                "share_embeddings_and_output_weights"
            )
        del shapes[OUTPUT_LAYER]
    for name in _VOCABULARY:
        if shapes.get(name):
            shapes[name] = (min(shapes[name][0], vocab_size), *shapes[name][1:])
    return shapes


def _stored_dtype(source: str, dtypes: Mapping[str, torch.dtype], names: Iterable[str]) -> torch.dtype:
    for name in names:
        if dtypes[name] not in _DTYPES:
            raise ValueError(f"{source}: tensor {name} is stored as {dtypes[name]}; supported are fp32, bf16 and fp16")
    return functools.reduce(torch.promote_types, (dtypes[name] for name in names))


def _origin(
    model: MegatronModel,
    family: str,
    architecture: Architecture,
    dtype: torch.dtype,
    mask: MaskToken,
    facts: TokenizerFacts,
) -> HfOrigin:
    ids = {f"{role}_id": facts.id_of(role) for role in _ROLES}
    return HfOrigin(
        family=family,
        dtype=str(dtype).removeprefix("torch."),
        mask_token=mask.token,
        mask_token_id=mask.token_id,
        added_rows=mask.added_rows,
        mlp_bias=architecture.bias,
        token_ids={role: id for role, id in ids.items() if id is not None},
        generation_config=dict(model.generation_config),
    )
