"""Core attention against loops over queries, heads and keys; with a cache, the same result in pieces."""

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from nemo_opdlm.diffusion.masks import AttentionRule, TokenAttributes, dense, last_visible
from nemo_opdlm.megatron.attention import AttentionContext, BlockDiffusionAttention, CachedQuery, KVCache
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.rotary import inverse_frequencies
from nemo_opdlm.megatron.student import ModelOptions, transformer_config
from nemo_opdlm.testing import tiny

HEADS, GROUPS, DIM, BLOCK_SIZE = 4, 2, 16, 4
INV_FREQ = inverse_frequencies(DIM, 10000.0)


def make_attention(rule: AttentionRule) -> BlockDiffusionAttention:
    config = transformer_config(tiny.architecture(), initialize(), ModelOptions())
    return BlockDiffusionAttention(
        AttentionContext(rule, INV_FREQ),
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
    )


def random_inputs(length: int, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(length)
    return tuple(  # type: ignore[return-value]
        torch.randn(length, batch, heads, DIM, generator=generator) for heads in (HEADS, GROUPS, GROUPS)
    )


def clean(position_ids: Tensor, document_ids: Tensor) -> TokenAttributes:
    return TokenAttributes(document_ids, torch.zeros_like(position_ids), position_ids, position_ids // BLOCK_SIZE)


def turned(x: Tensor, position: int) -> Tensor:
    """One head's vector, turned by its position, in fp64."""
    angles = position * INV_FREQ.double()
    number = torch.complex(x[: DIM // 2].double(), x[DIM // 2 :].double()) * torch.exp(1j * angles)
    return torch.cat([number.real, number.imag])


def oracle(rule: AttentionRule, query: Tensor, key: Tensor, value: Tensor, attributes: TokenAttributes) -> Tensor:
    length, batch = query.shape[:2]
    may_attend = dense(rule, attributes, attributes)[:, 0]
    out = torch.zeros(length, batch, HEADS * DIM, dtype=torch.float64)
    for b in range(batch):
        position_ids = attributes.position_ids[b].tolist()
        for i in range(length):
            visible = [j for j in range(length) if may_attend[b, i, j]]
            for head in range(HEADS):
                group = head // (HEADS // GROUPS)
                q = turned(query[i, b, head], position_ids[i])
                scores = [q @ turned(key[j, b, group], position_ids[j]) / DIM**0.5 for j in visible]
                weights = torch.stack(scores).softmax(0)
                part = sum(w * value[j, b, group].double() for w, j in zip(weights, visible, strict=True))
                out[i, b, head * DIM : (head + 1) * DIM] = part
    return out


@pytest.mark.parametrize("rule", list(AttentionRule))
def test_attention_is_that_of_loops_over_queries_heads_and_keys(rule: AttentionRule) -> None:
    position_ids = torch.stack([torch.arange(9), torch.arange(9) + 30])
    document_ids = torch.tensor([[0] * 9, [1] * 7 + [-1] * 2])
    attributes, inputs = clean(position_ids, document_ids), random_inputs(9, 2)
    found = make_attention(rule)(*inputs, attributes.stack())
    torch.testing.assert_close(found.double(), oracle(rule, *inputs, attributes), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("heads", "in_tiles"), [(1, False), (HEADS // GROUPS, False), (1, True)])
@pytest.mark.parametrize("rule", list(AttentionRule))
def test_a_text_in_pieces_against_the_cache_is_the_text_as_a_whole(
    rule: AttentionRule, heads: int, in_tiles: bool
) -> None:
    length, piece = 16, BLOCK_SIZE if rule is AttentionRule.BLOCK_DIFFUSION else 1
    position_ids, document_ids = torch.arange(length)[None], torch.zeros(1, length, dtype=torch.int64)
    inputs, attention = random_inputs(length, 1), make_attention(rule)
    whole = attention(*inputs, clean(position_ids, document_ids).stack())
    # Slot 2 of three, so that rows are looked up by slot.
    cache = KVCache(3, length + 5)
    with attention.context.use_cache(cache):
        for start in range(0, length, piece):
            now, column = slice(start, start + piece), torch.arange(piece)
            query = clean(position_ids[:, now], document_ids[:, now])
            cache.query = CachedQuery(
                torch.tensor([2]),
                torch.zeros_like(column),
                column,
                position_ids[0, now],
                last_visible(rule, position_ids[:, now], BLOCK_SIZE),
                num_keys=start + piece,
                joined_heads=heads,
                is_full=True,
                in_tiles=in_tiles,
            )
            found = attention(*(x[now] for x in inputs), query.stack())
            torch.testing.assert_close(found, whole[now], atol=1e-5, rtol=0)
    untouched = [part[:2] for part in cache.layer(1)] + [part[2, :, length:] for part in cache.layer(1)]
    assert not any(part.any() for part in untouched)
    assert attention.context.cache is None


def test_layers_share_one_plan_per_batch_and_never_an_older_one() -> None:
    context = AttentionContext(AttentionRule.CAUSAL, INV_FREQ)
    stacked = clean(torch.arange(6)[None], torch.zeros(1, 6, dtype=torch.int64)).stack()
    plan = context.plan(stacked)
    assert context.plan(stacked) is plan and context.plan(stacked.detach()) is plan
    assert context.plan(stacked.clone()) is not plan
    plan = context.plan(stacked)
    stacked[..., 2] += 1
    assert context.plan(stacked) is not plan
    assert torch.equal(context.plan(stacked).cos[0, 0, 0], (1 * INV_FREQ).cos().repeat(2))


def test_a_plan_made_under_another_rule_or_without_the_cache_is_not_used() -> None:
    context = AttentionContext(AttentionRule.CAUSAL, INV_FREQ)
    stacked = clean(torch.arange(6)[None], torch.zeros(1, 6, dtype=torch.int64)).stack()
    causal = context.plan(stacked).mask
    cache, column = KVCache(1, 8), torch.arange(1)
    with context.use_rule(AttentionRule.BLOCK_DIFFUSION):
        whole = context.plan(stacked).mask
        with context.use_cache(cache):
            cache.query = CachedQuery(
                column, column, column, column, column[None] + 3, num_keys=6, joined_heads=2, is_full=True
            )
            assert context.plan(stacked).mask.tolist() == [[2 * [4 * [True] + 2 * [False]]]]
        assert torch.equal(context.plan(stacked).mask, whole)
    assert torch.equal(context.plan(stacked).mask, causal)
    context.rule = AttentionRule.BLOCK_DIFFUSION
    assert not torch.equal(context.plan(stacked).mask, causal)
