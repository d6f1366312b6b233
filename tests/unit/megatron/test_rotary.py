"""Rotation by explicit positions, against complex numbers and against transformers' frequencies."""

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nemo_opdlm.megatron.rotary import cos_sin, inverse_frequencies, rotate

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_cosines_and_sines_are_those_of_transformers(kind: str) -> None:
    scaling = SCALINGS[kind]
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        max_position_embeddings=4096,
        rope_parameters={**scaling, "rope_theta": 5e5},
    )
    positions = torch.tensor([[0, 1, 7, 7, 130, 4095]])
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    found = cos_sin(inverse_frequencies(32, 5e5, scaling), positions)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_a_rotation_is_a_product_of_complex_numbers() -> None:
    x = torch.randn(3, 5, 2, 8, dtype=torch.float64)
    positions = torch.randint(0, 100, (3, 5))
    angles = positions[..., None].double() / 100.0 ** (torch.arange(4).double() / 4)
    expected = torch.complex(x[..., :4], x[..., 4:]) * torch.exp(1j * angles)[:, :, None]
    cos, sin = cos_sin(inverse_frequencies(8, 100.0), positions)
    found = rotate(x, cos[:, :, None], sin[:, :, None])
    torch.testing.assert_close(found, torch.cat([expected.real, expected.imag], -1), atol=1e-4, rtol=0)


def test_scores_depend_on_the_distance_alone() -> None:
    query, key = torch.randn(2, 1, 1, 16).unbind(0)
    inv_freq = inverse_frequencies(16, 10000.0)

    def score(query_position: int, key_position: int) -> torch.Tensor:
        turned = [
            rotate(x, *(part.view(1, 1, 16) for part in cos_sin(inv_freq, torch.tensor(position))))
            for x, position in ((query, query_position), (key, key_position))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 1), score(53, 51), atol=1e-4, rtol=0)


def test_an_unknown_scaling_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match="rope_scaling type 'yarn' is not supported: use one of default, linear, llama3"
    ):
        inverse_frequencies(8, 100.0, {"rope_type": "yarn", "factor": 2.0})
