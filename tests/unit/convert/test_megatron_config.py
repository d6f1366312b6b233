"""Settings of other trainers: what they are silent about is what those trainers assume, and nothing is guessed."""

from pathlib import Path
from typing import Any

import pytest

from nemo_opdlm.config import Architecture
from nemo_opdlm.convert.megatron_config import MEGATRON, NEMO_1, family_of, read_network, true_vocab_size
from nemo_opdlm.convert.plain_settings import read_yaml

SHAPE = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 24, "num_attention_heads": 4}
OF_NEMO_1 = {
    **SHAPE,
    "encoder_seq_length": 64,
    "activation": "fast-swiglu",
    "normalization": "rmsnorm",
    "position_embedding_type": "rope",
}
OF_MEGATRON = {
    **SHAPE,
    "seq_length": 64,
    "gated_linear_unit": True,
    "activation_func": {"_target_": "torch._C._nn.silu", "_call_": False},
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def test_silent_settings_mean_what_the_trainers_assume() -> None:
    nemo_1, megatron = read_network(OF_NEMO_1, NEMO_1), read_network(OF_MEGATRON, MEGATRON)
    assert nemo_1 == megatron
    assert nemo_1 == Architecture(
        **SHAPE,
        vocab_size=1,
        max_position_embeddings=64,
        layernorm_epsilon=1e-5,
        bias=True,
        qkv_bias=True,
        share_embeddings_and_output_weights=True,
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"seq_len_interpolation_factor": 4}, {"rope_type": "linear", "factor": 4.0}),
        ({"scale_positional_embedding": True}, {"rope_type": "llama3", "factor": 8.0, **LLAMA3}),
        ({"scale_positional_embedding": False, "rope_scaling": False}, None),
        ({"rope_scaling": True}, {"rope_type": "llama3", "factor": 8.0, **LLAMA3}),
        ({"rope_scaling": True, "rope_scaling_factor": 32.0}, {"rope_type": "llama3", "factor": 32.0, **LLAMA3}),
    ],
)
def test_every_switch_of_rotary_scaling(changes: dict[str, Any], expected: dict[str, Any] | None) -> None:
    assert read_network({**OF_MEGATRON, **changes}, MEGATRON).rope_scaling == expected


@pytest.mark.parametrize(
    ("biases", "expected"),
    [
        ({"bias": False, "qkv_bias": False, "qk_layernorm": True}, "qwen3"),
        ({"bias": False, "qkv_bias": True}, "qwen2"),
        ({"bias": True}, "llama"),
        ({"bias": False}, "llama"),
    ],
)
def test_the_family_follows_from_biases_and_norms(biases: dict[str, Any], expected: str) -> None:
    assert family_of(read_network({**OF_NEMO_1, **biases}, NEMO_1)) == expected


@pytest.mark.parametrize(
    ("settings", "rows", "num_tokens", "expected"),
    [
        ({}, 128, 40, 40),
        ({"tensor_model_parallel_size": 2}, 256, 40, 40),
        ({"make_vocab_size_divisible_by": 8}, 48, 41, 41),
        # Qwen3: 151,669 tokens would have been padded to 151,680.
        ({}, 151936, 151669, 151936),
        ({}, 128, 128, 128),
        ({"override_vocab_size": 100}, 128, 40, 100),
        ({"vocab_size": 151936, "tensor_model_parallel_size": 2}, 152064, 151669, 151936),
    ],
)
def test_the_true_vocabulary(settings: dict[str, Any], rows: int, num_tokens: int, expected: int) -> None:
    assert true_vocab_size(settings, rows, num_tokens) == expected


def test_tags_and_functions_of_yaml_are_names_only(tmp_path: Path) -> None:
    path = tmp_path / "run_config.yaml"
    path.write_text(
        "activation_func: !!python/name:torch.nn.functional.silu ''\nlayernorm_epsilon: 1e-6\nx: !y {a: 1}\n"
    )
    settings = read_yaml(path)
    assert settings["x"] == {"a": 1}
    assert read_network({**OF_MEGATRON, **settings}, MEGATRON).layernorm_epsilon == 1e-6
