"""Hugging Face `config.json` <-> Architecture. What we cannot represent exactly is refused by name, never ignored."""

from collections.abc import Mapping
from typing import Any

from nemo_opdlm.config import Architecture
from nemo_opdlm.convert.setting_values import count, number, section
from nemo_opdlm.data.shown import plain, shown

# Hugging Face `architectures` entry -> family. An SDAR folder is a Qwen3 model with a mask token.
FAMILY_OF = {
    "LlamaForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SDARForCausalLM": "qwen3",
}
ARCHITECTURE_OF = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# What transformers assumes where a config.json is silent.
_ROPE_THETA = 10000.0
_NORM_EPSILON = 1e-6
_INITIALIZER_RANGE = 0.02
_QWEN3_HEAD_DIM = 128
_LARGEST = 1e18

# RoPE type -> the numbers it needs; every other type is refused by name.
ROPE_KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Keys of a RoPE dict that carry no further meaning for the types above.
_ROPE_IDLE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}


def read_architecture(config: Mapping[str, Any]) -> tuple[Architecture, str]:
    """Read the network's shape from a parsed `config.json`.

    Returns:
        The architecture and its family (`llama`, `qwen2` or `qwen3`).

    Raises:
        ValueError: an unknown or unsupported setting, naming key, value and what is allowed.
    """
    family = _family(config)
    _refuse_unsupported(config, family)
    hidden, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
    groups = heads if config.get("num_key_value_heads") is None else _count(config, "num_key_value_heads")
    if heads % groups:
        raise ValueError(f"num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}")
    theta, scaling = _read_rope(config)
    bias = family == "llama" and bool(config.get("attention_bias"))
    architecture = Architecture(
        num_layers=_count(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_count(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=_head_dim(config, family, hidden, heads),
        max_position_embeddings=_count(config, "max_position_embeddings"),
        layernorm_epsilon=number("rms_norm_eps", config.get("rms_norm_eps", _NORM_EPSILON)),
        rotary_base=theta,
        rope_scaling=scaling,
        qkv_bias=bias or family == "qwen2",
        bias=bias,
        qk_layernorm=family == "qwen3",
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
        vocab_size=_count(config, "vocab_size"),
        init_method_std=number("initializer_range", config.get("initializer_range", _INITIALIZER_RANGE)),
    )
    return architecture, family


def write_config(architecture: Architecture, family: str, dtype_name: str, mlp_bias: bool = False) -> dict[str, Any]:
    """Write the `config.json` of a model: the inverse of `read_architecture`.

    RoPE is written flat (`rope_theta`, `rope_scaling`): transformers 4 and 5 and the serving engines all read that,
    while engines fall back to a base of 10000 where they only find transformers 5's nested `rope_parameters`.

    Args:
        architecture: the network's shape.
        family: `llama`, `qwen2` or `qwen3`.
        dtype_name: torch name of the weights' type, for example `bfloat16`.
        mlp_bias: Llama only: whether the feed-forward layers carry biases.
    """
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE_OF[family]],
        "model_type": family,
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "head_dim": architecture.kv_channels,
        "hidden_act": "silu",
        "rms_norm_eps": architecture.layernorm_epsilon,
        "rope_theta": architecture.rotary_base,
        "rope_scaling": None if architecture.rope_scaling is None else dict(architecture.rope_scaling),
        "attention_dropout": 0.0,
        "max_position_embeddings": architecture.max_position_embeddings,
        "initializer_range": architecture.init_method_std,
        "tie_word_embeddings": architecture.share_embeddings_and_output_weights,
        "use_cache": True,
        "torch_dtype": dtype_name,
    }
    if family == "llama":
        config |= {"attention_bias": architecture.bias, "mlp_bias": mlp_bias}
    else:
        config |= {"use_sliding_window": False, "sliding_window": None}
    if family == "qwen3":
        config["attention_bias"] = False
    return config


def _family(config: Mapping[str, Any]) -> str:
    named = config.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or not isinstance(named[0], str) or named[0] not in FAMILY_OF:
        raise ValueError(f"architectures={shown(named)} is not supported; allowed: {', '.join(FAMILY_OF)}")
    return FAMILY_OF[named[0]]


def _refuse_unsupported(config: Mapping[str, Any], family: str) -> None:
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"hidden_act={shown(activation)} is not supported; allowed: 'silu'")
    if config.get("quantization_config"):
        raise ValueError("quantization_config is set: quantised checkpoints are not supported; convert to bf16 first")
    if _slides(config, family):
        raise ValueError(
            f"sliding window attention is in use (use_sliding_window={shown(config.get('use_sliding_window'))}, "
            f"sliding_window={shown(config.get('sliding_window'))}); only full attention is supported"
        )
    if family == "qwen3" and config.get("attention_bias"):
        raise ValueError("attention_bias=true is not supported for Qwen3; allowed: false")
    if family == "llama" and config.get("mlp_bias") and not config.get("attention_bias"):
        raise ValueError("mlp_bias=true is only supported together with attention_bias=true")


def _slides(config: Mapping[str, Any], family: str) -> bool:
    """Whether any layer attends through a window. Qwen writes a window size even where it is switched off."""
    kinds = config.get("layer_types") or []
    if not isinstance(kinds, list):
        raise ValueError(f"layer_types={shown(kinds)} must be a list")
    if any(kind != "full_attention" for kind in kinds):
        return True
    if family == "llama" or not config.get("use_sliding_window") or config.get("sliding_window") is None:
        return False
    return number("max_window_layers", config.get("max_window_layers", 0)) < _count(config, "num_hidden_layers")


def _count(config: Mapping[str, Any], key: str) -> int:
    return count(key, config.get(key))


def _head_dim(config: Mapping[str, Any], family: str, hidden: int, heads: int) -> int:
    if config.get("head_dim") is not None:
        return _count(config, "head_dim")
    if family == "qwen3":
        return _QWEN3_HEAD_DIM
    if hidden % heads:
        raise ValueError(
            f"hidden_size={hidden} is not a multiple of num_attention_heads={heads} and head_dim is missing"
        )
    return hidden // heads


def _read_rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling, from the flat form (rope_theta, rope_scaling) or transformers 5's `rope_parameters`."""
    nested = section(config, "rope_parameters")
    scaling = nested or section(config, "rope_scaling")
    # transformers 5 nests one dict per kind of layer for mixed attention
    theta = number("rope_theta", nested.get("rope_theta", config.get("rope_theta", _ROPE_THETA)))
    if config.get("rope_theta", theta) != theta:
        raise ValueError(f"rope_theta={shown(config['rope_theta'])} contradicts rope_parameters.rope_theta={theta!r}")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ValueError(f"rope_type={shown(kind)} is not supported; allowed: {', '.join(ROPE_KEYS)}")
    if scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor other than 1.0 is not supported")
    unknown = sorted(set(scaling) - _ROPE_IDLE_KEYS - set(ROPE_KEYS[kind]))
    if unknown:
        raise ValueError(f"{plain(unknown[0])}={shown(scaling[unknown[0]])} is not known for rope_type={kind!r}")
    numbers = {key: scaling.get(key) for key in ROPE_KEYS[kind]}
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST:
            raise ValueError(f"rope_type={kind!r} needs a number for {key}, got {shown(value)}")
    return theta, ({"rope_type": kind, **numbers} if numbers else None)
