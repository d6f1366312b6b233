"""Attention chunk by chunk is attention at once, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from nemo_opdlm.diffusion.layout import two_stream_rows
from nemo_opdlm.diffusion.masks import AttentionRule, TokenAttributes, dense
from nemo_opdlm.diffusion.state_selection import random_mask
from nemo_opdlm.megatron import attention, chunked_attention
from nemo_opdlm.megatron.attention import AttentionContext, BlockDiffusionAttention
from nemo_opdlm.megatron.chunked_attention import attend_in_chunks
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import ModelOptions, transformer_config
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.trajectories import MASK_TOKEN_ID, random_trajectory

HEADS, GROUPS, DIM = 4, 2, 8


def random_rows(block_size: int) -> tuple[Tensor, list[Tensor]]:
    """Attributes of two-stream rows, and queries, keys and values ``[B, heads, N, d]`` of them."""
    trajectory = random_trajectory(5, block_size, seed=block_size)
    states = random_mask(trajectory, MASK_TOKEN_ID, num_states=2, seed=0, step=1)
    attributes = two_stream_rows(trajectory, states).attributes
    batch, length = attributes.position_ids.shape
    generator = torch.Generator().manual_seed(block_size)
    inputs = [
        torch.randn(batch, heads, length, DIM, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    return attributes.stack(), inputs


def gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return torch.autograd.grad((out * weights).sum(), inputs)


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("queries_at_a_time", [1, 7, 10_000])
def test_chunks_give_the_values_and_gradients_of_the_whole(
    block_size: int, queries_at_a_time: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacked, inputs = random_rows(block_size)
    context = AttentionContext(AttentionRule.BLOCK_DIFFUSION, torch.ones(DIM // 2))
    plan = context.plan(stacked)
    batch, length = stacked.shape[:2]
    monkeypatch.setattr(chunked_attention, "CHUNK_ELEMENTS", queries_at_a_time * batch * length)
    out = attend_in_chunks(*inputs, plan.mask_of, None, None)
    assert plan.may_attend is not None
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=plan.may_attend, enable_gqa=True)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_long_rows_are_attended_in_chunks_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module changes over where a mask would grow too large, and gives the same."""
    stacked, inputs = random_rows(4)
    rows_first = [x.detach().float().permute(2, 0, 1, 3) for x in inputs]
    outs = []
    for largest in (attention.DENSE_ELEMENTS, 1):
        monkeypatch.setattr(attention, "DENSE_ELEMENTS", largest)
        context = AttentionContext(AttentionRule.BLOCK_DIFFUSION, torch.ones(DIM // 2))
        module = BlockDiffusionAttention(
            context,
            config=transformer_config(tiny.architecture(), initialize(), ModelOptions()),
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
        )
        outs.append(module(*rows_first, stacked))
        assert (context.plan(stacked).may_attend is None) == (largest == 1)
    torch.testing.assert_close(*outs)


def test_the_mask_of_some_queries_is_those_rows_of_the_whole_mask() -> None:
    stacked, _ = random_rows(4)
    plan = AttentionContext(AttentionRule.CAUSAL, torch.ones(DIM // 2)).plan(stacked)
    attributes = TokenAttributes.unstack(stacked)
    whole = dense(AttentionRule.CAUSAL, attributes, attributes)
    assert torch.equal(plan.mask_of(3, 11), whole[:, :, 3:11])
