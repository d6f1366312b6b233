"""Attention chunk by chunk is attention at once, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from nemo_opdlm.diffusion.layout import BlockLayout, two_stream_rows
from nemo_opdlm.diffusion.masks import AttentionRule, TokenAttributes, dense
from nemo_opdlm.diffusion.state_selection import random_mask
from nemo_opdlm.megatron import attention, chunked_attention
from nemo_opdlm.megatron.attention import AttentionContext, BlockDiffusionAttention
from nemo_opdlm.megatron.chunked_attention import MaskChunks, attend_in_chunks
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import ModelOptions, transformer_config
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.trajectories import MASK_TOKEN_ID, random_trajectory

HEADS, GROUPS, DIM = 4, 2, 8
RULE = AttentionRule.BLOCK_DIFFUSION


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
    attributes = TokenAttributes.unstack(stacked)
    monkeypatch.setattr(chunked_attention, "CPU_QUERIES", queries_at_a_time)
    out = attend_in_chunks(*inputs, MaskChunks(RULE, attributes, attributes), None, None)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=dense(RULE, attributes, attributes), enable_gqa=True)
    torch.testing.assert_close(out, expected)
    for ours, theirs in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_long_rows_are_attended_in_chunks_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module changes over where a mask would grow too large, and gives the same."""
    stacked, inputs = random_rows(4)
    rows_first = [x.detach().float().permute(2, 0, 1, 3) for x in inputs]
    outs = []
    for longest in (attention.DENSE_LENGTH, 1):
        monkeypatch.setattr(attention, "DENSE_LENGTH", longest)
        context = AttentionContext(RULE, torch.ones(DIM // 2))
        module = BlockDiffusionAttention(
            context,
            config=transformer_config(tiny.architecture(), initialize(), ModelOptions()),
            layer_number=1,
            attn_mask_type=AttnMaskType.causal,
            attention_type="self",
        )
        outs.append(module(*rows_first, stacked))
        assert isinstance(context.plan(stacked).mask, MaskChunks) == (longest == 1)
    torch.testing.assert_close(*outs)


rules = pytest.mark.parametrize("rule", list(AttentionRule))


def packed_attributes() -> TokenAttributes:
    """Two packed rows of several documents each, and padding."""
    rows = []
    for seed in (0, 1):
        trajectory = random_trajectory(6, 4, seed=seed)
        states = random_mask(trajectory, MASK_TOKEN_ID, num_states=2, seed=seed, step=1)
        rows.append(two_stream_rows(trajectory, states).packed(multiple_of=512).attributes.stack())
    return TokenAttributes.unstack(torch.cat(rows))


@rules
@pytest.mark.parametrize("room", [0, 1500, chunked_attention.KEPT_ELEMENTS])
def test_the_chunks_are_the_whole_mask_without_keys_that_nobody_sees(
    rule: AttentionRule, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_attention, "CPU_QUERIES", 24)
    monkeypatch.setattr(chunked_attention, "KEPT_ELEMENTS", room)
    attributes = packed_attributes()
    whole = dense(rule, attributes, attributes)
    chunks = MaskChunks(rule, attributes, attributes)
    for _ in range(2):
        found = torch.zeros_like(whole)
        for chunk in chunks:
            assert chunk.keys is not None
            found[:, :, chunk.start : chunk.stop, chunk.keys] = chunk.may_attend
            assert chunk.may_attend.flatten(0, 2).any(0).all()
        assert torch.equal(found, whole)
    kept = [first is second for first, second in zip(chunks, chunks, strict=True)]
    assert all(kept) == (room > 1500)


@rules
def test_packed_rows_spend_nothing_on_other_documents(rule: AttentionRule) -> None:
    """The area of all chunks is that of the documents apart, but for the ends of documents within a chunk."""
    lengths = torch.tensor([700, 900, 400, 1200])
    layout = BlockLayout(torch.full_like(lengths, 100), lengths, torch.ones_like(lengths), 4)
    attributes = layout.attributes()
    is_token = attributes.document_ids >= 0

    def area(attributes: TokenAttributes) -> int:
        return sum(chunk.may_attend.numel() for chunk in MaskChunks(rule, attributes, attributes))

    together = area(attributes.map(lambda x: x[is_token][None]))
    apart = sum(
        area(attributes.map(lambda x, row=row: x[row : row + 1, : int(layout.row_len[row])]))  # type: ignore[misc]
        for row in range(4)
    )
    assert together <= 1.1 * apart <= 0.2 * int(layout.row_len.sum()) ** 2
