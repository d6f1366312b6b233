"""config.json <-> Architecture: every supported setting is read, every other one refused by name."""

from typing import Any

import pytest

from nemo_opdlm.convert.hf_config import read_architecture, write_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "vocab_size": 100,
    "rms_norm_eps": 1e-5,
    "rope_theta": 20000,
}
QWEN3 = {**LLAMA, "architectures": ["Qwen3ForCausalLM"]}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_sizes_are_read_under_nemo_names() -> None:
    architecture, family = read_architecture(LLAMA)
    assert family == "llama"
    assert (architecture.num_layers, architecture.hidden_size, architecture.ffn_hidden_size) == (4, 64, 96)
    assert (architecture.num_attention_heads, architecture.num_query_groups, architecture.kv_channels) == (4, 2, 16)
    assert (architecture.vocab_size, architecture.max_position_embeddings) == (100, 256)
    assert (architecture.layernorm_epsilon, architecture.rotary_base) == (1e-5, 20000.0)
    assert not architecture.share_embeddings_and_output_weights


@pytest.mark.parametrize(
    ("name", "family", "qkv_bias", "qk_layernorm", "head_dim"),
    [
        ("LlamaForCausalLM", "llama", False, False, 16),
        ("Qwen2ForCausalLM", "qwen2", True, False, 16),
        ("Qwen3ForCausalLM", "qwen3", False, True, 128),
        ("SDARForCausalLM", "qwen3", False, True, 128),
    ],
)
def test_a_family_implies_its_biases_norms_and_head_size(
    name: str, family: str, qkv_bias: bool, qk_layernorm: bool, head_dim: int
) -> None:
    architecture, found = read_architecture({**LLAMA, "architectures": [name]})
    assert found == family
    assert (architecture.qkv_bias, architecture.qk_layernorm) == (qkv_bias, qk_layernorm)
    assert architecture.kv_channels == head_dim and not architecture.bias


def test_missing_key_value_heads_mean_as_many_as_query_heads() -> None:
    assert read_architecture({**LLAMA, "num_key_value_heads": None})[0].num_query_groups == 4


@pytest.mark.parametrize(
    ("rope", "base", "scaling"),
    [
        ({}, 20000.0, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 20000.0, {"rope_type": "linear", "factor": 2.0}),
        ({"rope_scaling": LLAMA3}, 20000.0, LLAMA3),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, 7.0, None),
        ({"rope_theta": 9.0, "rope_parameters": {**LLAMA3, "rope_theta": 9.0}}, 9.0, LLAMA3),
    ],
    ids=["flat", "theta", "linear", "llama3", "nested", "nested-llama3"],
)
def test_rope_is_read_from_the_flat_and_the_nested_form(rope: dict[str, Any], base: float, scaling: Any) -> None:
    architecture, _ = read_architecture({**LLAMA, **rope})
    assert (architecture.rotary_base, architecture.rope_scaling) == (base, scaling)


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "longrope", "su", "mrope", "proportional"])
def test_other_rope_types_are_refused_by_name(kind: str) -> None:
    with pytest.raises(ValueError, match=f"rope_type='{kind}' is not supported; allowed: default, linear, llama3"):
        read_architecture({**LLAMA, "rope_scaling": {"rope_type": kind, "factor": 2.0}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Qwen3MoeForCausalLM"]}, r"architectures=\['Qwen3MoeForCausalLM'\] .*allowed: LlamaForC"),
        ({"architectures": None}, "architectures=None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; allowed: 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "sliding window attention is in use"),
        ({"mlp_bias": True}, "mlp_bias=true is only supported together with attention_bias=true"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_key_value_heads=3"),
        ({"hidden_size": 66}, "hidden_size=66 is not a multiple of num_attention_heads=4 and head_dim is missing"),
        ({"vocab_size": "many"}, "vocab_size='many' must be a positive integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive integer"),
        ({"rope_theta": "big"}, "rope_theta='big' must be a number"),
        ({"rope_parameters": {"rope_theta": 3.0}}, "rope_theta=20000 contradicts rope_parameters.rope_theta=3.0"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type='linear' needs a number for factor, got None"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section=.* is not known"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_represented_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_architecture({**LLAMA, **change})


def test_a_missing_size_is_named() -> None:
    with pytest.raises(ValueError, match="intermediate_size is missing"):
        read_architecture({key: value for key, value in LLAMA.items() if key != "intermediate_size"})


def test_a_sliding_window_that_is_switched_off_or_reached_by_no_layer_is_accepted() -> None:
    read_architecture({**QWEN3, "use_sliding_window": False, "sliding_window": 32})
    read_architecture({**QWEN3, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 4})
    with pytest.raises(ValueError, match="use_sliding_window=True, sliding_window=32"):
        read_architecture({**QWEN3, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3})


def test_qwen3_with_attention_bias_is_refused() -> None:
    with pytest.raises(ValueError, match="attention_bias=true is not supported for Qwen3"):
        read_architecture({**QWEN3, "attention_bias": True})


@pytest.mark.parametrize("rope_scaling", [None, LLAMA3])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_a_written_config_reads_back_as_the_same_architecture(name: str, rope_scaling: Any) -> None:
    source = {**LLAMA, "architectures": [name], "rope_scaling": rope_scaling, "tie_word_embeddings": True}
    architecture, family = read_architecture(source)
    written = write_config(architecture, family, "float32")
    assert read_architecture(written) == (architecture, family)
    assert written["rope_theta"] == 20000.0 and "rope_parameters" not in written
