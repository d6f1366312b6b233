"""A rollout's own forward pass computes what Megatron's layers do."""

from typing import Any

import pytest
import torch

from nemo_opdlm.diffusion.denoiser import Query
from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.megatron.attention import KVCache
from nemo_opdlm.megatron.denoiser import MegatronDenoiser
from nemo_opdlm.megatron.inference import suits
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import ModelOptions, StagedGPT, autocast
from nemo_opdlm.testing import tiny

BLOCK_SIZE = 4
#: What families differ in, and ways to hold a network.
NETWORKS: dict[str, tuple[dict[str, Any], ModelOptions]] = {
    "llama": ({}, ModelOptions()),
    "qwen3": ({"qk_layernorm": True, "kv_channels": 24}, ModelOptions()),
    "qwen2": ({"qkv_bias": True}, ModelOptions()),
    "biases": ({"bias": True}, ModelOptions()),
    "one head a group": ({"num_query_groups": 4}, ModelOptions()),
    "bf16": ({}, ModelOptions(params_dtype=torch.bfloat16)),
    "autocast": ({}, ModelOptions(autocast_dtype=torch.bfloat16)),
    "recomputation": (
        {},
        ModelOptions(
            transformer_config={
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            }
        ),
    ),
}


@torch.no_grad()
def hidden_states(network: StagedGPT, is_lean: bool) -> list[torch.Tensor]:
    """Of what is asked by a prefill and two forwards, the second of which commits a block in one row; and all keys and values."""
    forbidden = torch.zeros(tiny.VOCAB_SIZE, dtype=torch.bool)
    cache = KVCache(3, 16)
    denoiser = MegatronDenoiser(network, cache, BLOCK_SIZE, tiny.MASK_TOKEN_ID, SamplingParams(), forbidden)
    assert denoiser.is_lean
    denoiser.is_lean = is_lean
    slots, tokens = torch.tensor([0, 2]), torch.randint(4, 30, (2, 8), generator=torch.Generator().manual_seed(1))
    tokens[0, 5:7] = tokens[1, 4:] = tiny.MASK_TOKEN_ID
    positions = torch.arange(8).expand(2, -1)
    valid = torch.ones(2, 8, dtype=torch.bool)
    partly = valid.clone()
    partly[1, :4] = False
    queries = [
        Query(slots, tokens[:, :4], positions[:, :4], valid[:, :4], 4, None),
        Query(slots, tokens[:, 4:], positions[:, 4:], valid[:, 4:], 8, torch.rand(2, 4)),
        Query(slots, tokens, positions + torch.tensor([[4], [0]]), partly, 12, torch.rand(2, 4)),
    ]
    with (
        network.attention.use_cache(cache),
        autocast(network.options.autocast_dtype, torch.device("cpu")),
    ):
        found = [denoiser.forward(denoiser.prepare(query)) for query in queries]
    assert [len(hidden) for hidden in found] == [0, 6, 6]
    # The place behind the last position is anybody's.
    return found + [x[:, :, :-1] for layer in range(1, network.arch.num_layers + 1) for x in cache.layer(layer)]


@pytest.mark.parametrize("name", NETWORKS)
def test_hidden_states_are_those_of_megatrons_layers(name: str) -> None:
    fields, options = NETWORKS[name]
    network = tiny.random_network(tiny.architecture(**fields), initialize(), options=options).eval()
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if "32" in str(options.params_dtype) else {"rtol": 0.02, "atol": 0.02}
    if options.autocast_dtype is not None:
        tolerance = {"rtol": 0.02, "atol": 0.02}
    for found, expected in zip(hidden_states(network, True), hidden_states(network, False), strict=True):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        torch.testing.assert_close(found, expected, **tolerance)


def test_layers_that_are_configured_otherwise_take_megatrons_way() -> None:
    options = ModelOptions(transformer_config={"fp32_residual_connection": True})
    assert not suits(tiny.random_network(tiny.architecture(), initialize(), options=options))
