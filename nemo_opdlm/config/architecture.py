"""What the network is, as opposed to how it is held or trained; only how its vocabulary is padded is a matter of a run."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

#: An archive may not make a network of any size it likes.
LARGEST_DIVISOR = 2**16


@dataclass(frozen=True)
class Architecture:
    """A dense decoder-only transformer with RMSNorm, SwiGLU and rotary positions, under NeMo's key names.

    Attributes:
        num_layers: transformer layers.
        hidden_size: width of the residual stream.
        ffn_hidden_size: width of the SwiGLU layer.
        num_attention_heads: query heads.
        vocab_size: rows of the vocabulary before padding.
        max_position_embeddings: longest sequence, in tokens.
        num_query_groups: key/value heads; None = as many as query heads.
        kv_channels: size of one head; None = hidden_size / num_attention_heads.
        layernorm_epsilon: epsilon of every RMSNorm.
        rotary_base: base of the rotary frequencies.
        rope_scaling: rotary scaling in the Hugging Face form, or None.
        qkv_bias: bias on the query, key and value projections.
        bias: bias on all linear layers.
        qk_layernorm: RMSNorm on every query and key head.
        share_embeddings_and_output_weights: the LM head is the embedding.
        init_method_std: standard deviation of fresh weights.
        make_vocab_size_divisible_by: every tensor-parallel rank holds a multiple of so many vocabulary rows; those that no
            token has are never seen. Products of odd widths, as a mask token's row makes them, are slow everywhere.

    Raises:
        ValueError: from `validate`, at construction.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    num_query_groups: int = None  # type: ignore[assignment]  # always an int after __post_init__
    kv_channels: int = None  # type: ignore[assignment]  # always an int after __post_init__
    layernorm_epsilon: float = 1e-6
    rotary_base: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    qkv_bias: bool = False
    bias: bool = False
    qk_layernorm: bool = False
    share_embeddings_and_output_weights: bool = False
    init_method_std: float = 0.02
    make_vocab_size_divisible_by: int = 128

    @classmethod
    def from_keys(cls, keys: Mapping[str, Any]) -> "Architecture | None":
        """The network that keys of a model section describe, e.g. those of `conf/model`; None if they leave its shape open.

        Raises:
            ValueError: they describe no network.
        """
        given = {field.name: keys[field.name] for field in fields(cls) if keys.get(field.name) is not None}
        is_whole = all(field.name in given for field in fields(cls) if field.default is MISSING)
        return cls(**given) if is_whole else None

    def __post_init__(self) -> None:
        """Fill the two derived fields, then `validate`."""
        for name in ("hidden_size", "num_attention_heads"):  # the derived fields are made of them
            _check_count(name, getattr(self, name))
        if self.num_query_groups is None:
            object.__setattr__(self, "num_query_groups", self.num_attention_heads)
        if self.kv_channels is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size={self.hidden_size} is not a multiple of "
                    f"num_attention_heads={self.num_attention_heads}: give kv_channels"
                )
            object.__setattr__(self, "kv_channels", self.hidden_size // self.num_attention_heads)
        self.validate()

    def validate(self) -> None:
        """Raise ValueError, naming the field and its value, unless the fields describe a network."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                _check_count(field.name, value)
            if field.type is bool and not isinstance(value, bool):
                raise ValueError(f"{field.name}={value!r} must be true or false")
        if self.make_vocab_size_divisible_by > LARGEST_DIVISOR:
            raise ValueError(
                f"make_vocab_size_divisible_by={self.make_vocab_size_divisible_by} must be at most {LARGEST_DIVISOR}"
            )
        for name in ("layernorm_epsilon", "rotary_base", "init_method_std"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name}={value!r} must be a positive number")
        if not isinstance(self.rope_scaling, Mapping | None):
            raise ValueError(f"rope_scaling={self.rope_scaling!r} must be a section of keys")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_query_groups={self.num_query_groups} must divide num_attention_heads={self.num_attention_heads}"
            )
        if self.kv_channels % 2:
            raise ValueError(f"kv_channels={self.kv_channels} must be even: rotary positions turn pairs of channels")

    def padded_to(self, make_vocab_size_divisible_by: int | None) -> "Architecture":
        """The same network with its vocabulary padded as a run asks for; None = as it is."""
        divisor = make_vocab_size_divisible_by
        return self if divisor is None else replace(self, make_vocab_size_divisible_by=divisor)

    def padded_vocab_size(self, tensor_model_parallel_size: int) -> int:
        """Vocabulary rows of all tensor-parallel ranks together, as Megatron pads them."""
        multiple = self.make_vocab_size_divisible_by * tensor_model_parallel_size
        return -(-self.vocab_size // multiple) * multiple

    @property
    def num_parameters(self) -> int:
        """Values of the matrices; norms and biases are left out."""
        heads = (self.num_attention_heads + 2 * self.num_query_groups + self.num_attention_heads) * self.kv_channels
        layer = self.hidden_size * (heads + 3 * self.ffn_hidden_size)
        tables = 1 if self.share_embeddings_and_output_weights else 2
        return self.num_layers * layer + tables * self.vocab_size * self.hidden_size


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer")
