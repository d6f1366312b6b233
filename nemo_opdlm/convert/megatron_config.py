"""Settings of models that NeMo and Megatron-Bridge trained -> Architecture. What we cannot represent is refused by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_opdlm.config import Architecture
from nemo_opdlm.convert.setting_values import count, number, switch
from nemo_opdlm.data.shown import shown

Settings = Mapping[str, Any]
_COUNTS = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "kv_channels")
_NUMBERS = ("layernorm_epsilon", "rotary_base", "init_method_std")
_SWITCHES = ("bias", "qkv_bias", "qk_layernorm", "share_embeddings_and_output_weights")
_OFF = (None, False, 0)
_LLAMA3_CONTEXT = 8192


@dataclass(frozen=True)
class Dialect:
    """How one trainer writes down a network.

    Attributes:
        names: field of `Architecture` -> the trainer's keys, the first that is set wins; other fields have their own name.
        assumed: key -> what the trainer assumes where its settings are silent.
        only: key -> the values that describe our networks, compared without case.
    """

    names: Mapping[str, tuple[str, ...]]
    assumed: Mapping[str, Any]
    only: Mapping[str, tuple[Any, ...]]


_ASSUMED = {
    "layernorm_epsilon": 1e-5,
    "rotary_base": 10000.0,
    "init_method_std": 0.02,
    "share_embeddings_and_output_weights": True,
    "qk_layernorm": False,
    "position_embedding_type": "learned_absolute",
    "normalization": "layernorm",
}
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "normalization": ("rmsnorm",),
    "layernorm_zero_centered_gamma": _OFF,
    "position_embedding_type": ("rope",),
    "rotary_interleaved": _OFF,
    "num_moe_experts": _OFF,
    "window_size": _OFF,
    "attn_logit_softcapping": _OFF,
    "final_logit_softcapping": _OFF,
}
#: `model_config.yaml` of a NeMo 1.x archive.
NEMO_1 = Dialect(
    names={"max_position_embeddings": ("max_position_embeddings", "encoder_seq_length")},
    assumed={**_ASSUMED, "bias": True, "qkv_bias": False, "activation": "gelu"},
    only={
        **_ONLY,
        "mcore_gpt": (None, True),
        "activation": ("swiglu", "fast-swiglu"),
        "rotary_percentage": (None, 1),
        "transformer_block_type": (None, "pre_ln"),
        "normalize_attention_scores": (None, True),
        "headscale": _OFF,
        "apply_embedding_scaling": _OFF,
    },
)
#: Megatron-core's own names: NeMo 2.0 and Megatron-Bridge.
MEGATRON = Dialect(
    names={
        "max_position_embeddings": ("max_position_embeddings", "seq_length"),
        "bias": ("add_bias_linear",),
        "qkv_bias": ("add_qkv_bias",),
    },
    assumed={
        **_ASSUMED,
        "add_bias_linear": True,
        "add_qkv_bias": False,
        "gated_linear_unit": False,
        "activation_func": "torch.nn.functional.gelu",
    },
    only={
        **_ONLY,
        "gated_linear_unit": (True,),
        "activation_func": ("silu", "swish"),
        "rotary_percent": (None, 1),
        "softmax_scale": _OFF,
        "multi_latent_attention": _OFF,
        "qk_l2_norm": _OFF,
        "mtp_num_layers": _OFF,
        "apply_residual_connection_post_layernorm": _OFF,
        "heterogeneous_layers_config_path": _OFF,
        "no_rope_freq": _OFF,
    },
)


def read_network(settings: Settings, dialect: Dialect) -> Architecture:
    """The network that settings describe; its vocabulary of one row is to be replaced (see `true_vocab_size`).

    Args:
        settings: of the model, plain data.
        dialect: whose settings they are.

    Raises:
        ValueError: a setting is missing, no number, or asks for what we cannot represent; one line that names the key.
    """
    for key, allowed in dialect.only.items():
        value = settings.get(key, dialect.assumed.get(key))
        if not any(_plain(value) == item for item in allowed):
            choices = " or ".join("null" if item is None else repr(item) for item in allowed)
            raise ValueError(f"{key}={shown(_plain(value))} is not supported; allowed: {choices}")

    def setting(field: str) -> tuple[str, Any]:
        keys = dialect.names.get(field, (field,))
        key = next((key for key in keys if settings.get(key) is not None), keys[0])
        value = settings.get(key)
        return key, dialect.assumed.get(key) if value is None else value

    fields: dict[str, Any] = {field: count(*setting(field)) for field in _COUNTS if setting(field)[1] is not None}
    fields |= {field: number(*setting(field)) for field in _NUMBERS}
    fields |= {field: switch(*setting(field)) for field in _SWITCHES}
    fields["max_position_embeddings"] = count(*setting("max_position_embeddings"))
    for field in _COUNTS[:4]:
        if field not in fields:
            raise ValueError(f"{field} is missing")
    fields["qkv_bias"] |= fields["bias"]
    return Architecture(**fields, rope_scaling=_rope_scaling(settings), vocab_size=1)


def family_of(architecture: Architecture) -> str:
    """The Hugging Face family whose tensors a network has.

    Raises:
        ValueError: no supported family combines these biases and norms.
    """
    if architecture.qk_layernorm and architecture.qkv_bias:
        raise ValueError("qk_layernorm=True together with biases is not supported: no known family has both")
    if architecture.qk_layernorm:
        return "qwen3"
    return "qwen2" if architecture.qkv_bias and not architecture.bias else "llama"


def true_vocab_size(settings: Settings, rows: int, num_tokens: int) -> int:
    """Rows of the vocabulary without those that pad the embedding for tensor parallelism.

    The settings may name the number. Where they do not, both trainers pad the tokenizer's; rows that this does not
    explain belong to the model (Qwen has more rows than tokens).

    Args:
        settings: of the model.
        rows: of the stored embedding.
        num_tokens: of the tokenizer.

    Raises:
        ValueError: the embedding has fewer rows than the settings say.
    """
    for key in ("override_vocab_size", "vocab_size"):
        if settings.get(key) is not None:
            named = count(key, settings[key])
            if named > rows:
                raise ValueError(f"{key}={named}, but the stored embedding has {rows} rows")
            return named
    divisor = settings.get("make_vocab_size_divisible_by") or 128
    multiple = count("make_vocab_size_divisible_by", divisor) * parallel_size(settings, "tensor")
    return num_tokens if rows == -(-num_tokens // multiple) * multiple else rows


def parallel_size(settings: Settings, axis: str) -> int:
    """Ranks along the `tensor` or `pipeline` axis when the model was saved; 1 where the settings are silent."""
    key = f"{axis}_model_parallel_size"
    return 1 if settings.get(key) is None else count(key, settings[key])


def _plain(value: Any) -> Any:
    """A value as the tables compare it: names in lower case, functions by the last part of their name."""
    if isinstance(value, dict):
        value = str(value.get("_target_", value))
    return value.rsplit(".", 1)[-1].lower() if isinstance(value, str) else value


def _rope_scaling(settings: Settings) -> dict[str, Any] | None:
    """Rotary scaling in the Hugging Face form. Each trainer has its own switch for the one of Llama 3.1."""
    found = []
    if settings.get("seq_len_interpolation_factor") is not None:
        factor = number("seq_len_interpolation_factor", settings["seq_len_interpolation_factor"])
        found.append({"rope_type": "linear", "factor": factor})
    if settings.get("scale_positional_embedding"):
        found.append(_llama3(8.0))
    if settings.get("rope_scaling"):
        if settings["rope_scaling"] is not True:
            raise ValueError(f"rope_scaling={shown(settings['rope_scaling'])} is not supported; allowed: true or false")
        found.append(_llama3(number("rope_scaling_factor", settings.get("rope_scaling_factor", 8.0))))
    if settings.get("old_context_len") is not None:
        keys = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
        found.append(_llama3(*(number(key, settings.get(key)) for key in keys)))
    if len(found) > 1:
        raise ValueError(f"the settings ask for two rotary scalings at once: {found[0]} and {found[1]}")
    return found[0] if found else None


def _llama3(factor: float, low: float = 1.0, high: float = 4.0, context: float = _LLAMA3_CONTEXT) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": int(context),
    }
