"""The attention rules: equal to the slow loops, equal in both forms, no path from the answer to the question."""

import pytest
import torch

from nemo_opdlm.diffusion.layout import BlockLayout
from nemo_opdlm.diffusion.masks import (
    AttentionRule,
    TokenAttributes,
    causal,
    dense,
    last_visible,
    mask_mod,
    may_be_seen,
)
from nemo_opdlm.testing.oracles import oracle_may_attend, oracle_row

RULES = list(AttentionRule)
CASES = [
    # (prompt_len, response_len, block_size, copies)
    (1, 1, 4, 1),
    (3, 6, 4, 2),
    (4, 4, 4, 1),
    (5, 7, 4, 3),
    (6, 2, 4, 0),
    (7, 10, 3, 2),
    (2, 5, 8, 2),
    (3, 4, 1, 2),
    (9, 13, 5, 1),
]


def layout_of(cases: list[tuple[int, int, int, int]]) -> BlockLayout:
    prompt_len, response_len, block_size, copies = zip(*cases, strict=True)
    assert len(set(block_size)) == 1
    return BlockLayout(torch.tensor(prompt_len), torch.tensor(response_len), torch.tensor(copies), block_size[0])


def attributes_of(*cases: tuple[int, int, int, int], width: int | None = None) -> TokenAttributes:
    return layout_of(list(cases)).attributes(width)


def mixed_batch() -> TokenAttributes:
    return attributes_of((1, 1, 4, 1), (3, 6, 4, 2), (9, 8, 4, 1), (6, 2, 4, 0), width=60)


@pytest.mark.parametrize(("prompt_len", "response_len", "block_size", "copies"), CASES)
def test_dense_equals_the_equations(prompt_len: int, response_len: int, block_size: int, copies: int) -> None:
    attributes = attributes_of((prompt_len, response_len, block_size, copies))
    canvas = [0] * (prompt_len + response_len + block_size)
    row = oracle_row(canvas, [canvas] * copies, prompt_len, response_len, block_size)
    expected = [[oracle_may_attend(q, k, block_size) for k in row] for q in row]
    actual = dense(AttentionRule.BLOCK_DIFFUSION, attributes, attributes)
    assert actual.shape == (1, 1, len(row), len(row))
    assert torch.equal(actual[0, 0], torch.tensor(expected))


def test_causal_rule_is_lower_triangular_on_the_clean_stream() -> None:
    attributes = attributes_of((5, 7, 4, 0))
    actual = dense(AttentionRule.CAUSAL, attributes, attributes)[0, 0]
    assert torch.equal(actual, torch.ones_like(actual).tril())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_size", [1, 4, 8])
def test_a_clean_stream_sees_all_up_to_its_last_visible_position(rule: AttentionRule, block_size: int) -> None:
    positions = torch.arange(24)
    tokens = attributes_of((16, 8, block_size, 0))
    expected = positions <= last_visible(rule, positions, block_size)[:, None]
    assert torch.equal(dense(rule, tokens, tokens)[0, 0], expected)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("num_queries", [1, 5, 16])
def test_no_query_sees_a_key_beyond_the_bound(rule: AttentionRule, num_queries: int) -> None:
    rows = mixed_batch()
    packed = rows.map(lambda x: x[rows.document_ids >= 0][None])
    for key in (rows, packed):
        is_tight = False
        for start in range(0, key.block_ids.shape[1], num_queries):
            query = key.map(lambda x, start=start: x[:, start : start + num_queries])  # type: ignore[misc]
            bound, seen = may_be_seen(query, key), dense(rule, query, key).any(2)[:, 0]
            assert not (seen & ~bound).any()
            is_tight |= bool((~bound).any())
        assert is_tight


@pytest.mark.parametrize("rule", RULES)
def test_mask_mod_equals_dense(rule: AttentionRule) -> None:
    attributes = mixed_batch()
    rows, length = attributes.block_ids.shape
    function = mask_mod(rule, attributes, attributes)
    head = torch.tensor(0)
    over_keys = torch.vmap(function, in_dims=(None, None, None, 0))
    over_pairs = torch.vmap(over_keys, in_dims=(None, None, 0, None))
    evaluated = torch.vmap(over_pairs, in_dims=(0, None, None, None))
    actual = evaluated(torch.arange(rows), head, torch.arange(length), torch.arange(length))
    assert torch.equal(actual[:, None], dense(rule, attributes, attributes))


def test_queries_may_be_part_of_the_keys() -> None:
    attributes = mixed_batch()
    part = slice(5, 21)
    query = attributes.map(lambda x: x[:, part])
    for rule in RULES:
        whole = dense(rule, attributes, attributes)
        assert torch.equal(dense(rule, query, attributes), whole[:, :, part])
        function = mask_mod(rule, query, attributes)
        at = [torch.tensor(i) for i in (1, 0, 3, 7)]
        assert function(*at) == whole[1, 0, 8, 7]


def test_documents_packed_into_one_row_never_see_each_other() -> None:
    attributes = mixed_batch()
    packed = attributes.map(lambda x: x.flatten()[None])
    same_row = torch.block_diag(*torch.ones(4, 60, 60)).bool()
    both_padding = (packed.document_ids == -1) & (packed.document_ids == -1).mT
    for rule in RULES:
        mask = dense(rule, packed, packed)[0, 0]
        assert not mask[~same_row & ~both_padding].any()
        separate = torch.block_diag(*dense(rule, attributes, attributes)[:, 0].float()).bool()
        assert torch.equal(mask & same_row, separate)


@pytest.mark.parametrize("rule", RULES)
def test_padding_sees_padding_only_and_no_clean_row_is_empty(rule: AttentionRule) -> None:
    attributes = mixed_batch()
    is_padding = attributes.document_ids == -1
    mask = dense(rule, attributes, attributes)[:, 0]
    assert is_padding.any(-1).all()
    assert torch.equal(mask & is_padding[..., None], is_padding[..., None] & is_padding[:, None])
    assert not (mask & ~is_padding[..., None] & is_padding[:, None]).any()
    needs_row = torch.ones_like(is_padding) if rule is AttentionRule.BLOCK_DIFFUSION else attributes.stream_ids == 0
    assert mask.any(-1)[needs_row].all()


@pytest.mark.parametrize(("prompt_len", "response_len", "block_size", "copies"), CASES)
def test_no_path_of_attention_leads_from_a_state_block_to_its_clean_block_or_a_later_one(
    prompt_len: int, response_len: int, block_size: int, copies: int
) -> None:
    # What can reach a token through any number of layers is the transitive closure of the mask.
    attributes = attributes_of((prompt_len, response_len, block_size, copies))
    reach = dense(AttentionRule.BLOCK_DIFFUSION, attributes, attributes)[0, 0].double()
    for _ in range(len(reach).bit_length()):
        reach = (reach @ reach > 0).double()
    stream, block = attributes.stream_ids[0], attributes.block_ids[0]
    is_state = stream > 0
    clean_past = (stream == 0) & (block < block[:, None])
    own_block = (stream == stream[:, None]) & (block == block[:, None])
    assert torch.equal(reach.bool()[is_state], (clean_past | own_block)[is_state])


def test_copies_in_one_row_see_what_they_see_in_rows_of_their_own() -> None:
    together, alone = attributes_of((5, 7, 4, 3)), attributes_of((5, 7, 4, 1))
    mask = dense(AttentionRule.BLOCK_DIFFUSION, together, together)[0, 0]
    clean_len, stream_len = 12, 8
    clean = torch.arange(clean_len)
    for copy in range(3):
        columns = torch.cat([clean, clean_len + copy * stream_len + torch.arange(stream_len)])
        expected = dense(AttentionRule.BLOCK_DIFFUSION, alone, alone)[0, 0]
        assert torch.equal(mask[columns][:, columns], expected)
        others = torch.ones(mask.shape[0], dtype=torch.bool)
        others[columns] = False
        assert not mask[columns][:, others].any()


def test_block_size_one_reduces_to_causal_conditioning() -> None:
    attributes = attributes_of((3, 5, 1, 1))
    mask = dense(AttentionRule.BLOCK_DIFFUSION, attributes, attributes)[0, 0]
    clean_len = 8
    assert torch.equal(mask[:clean_len, :clean_len], torch.ones(8, 8).tril().bool())
    for offset in range(5):
        position = 3 + offset
        visible = mask[clean_len + offset].nonzero()[:, 0].tolist()
        assert visible == [*range(position), clean_len + offset]


def test_attributes_survive_stacking() -> None:
    attributes = mixed_batch()
    stacked = attributes.stack()
    assert stacked.shape == (4, 60, 4) and stacked.dtype == torch.int64
    assert torch.equal(TokenAttributes.unstack(stacked).stack(), stacked)


def test_causal_ignores_state_tokens() -> None:
    attributes = attributes_of((3, 5, 4, 1))
    mask = causal(attributes.map(lambda x: x[:, :, None]), attributes.map(lambda x: x[:, None]))[0]
    is_state = attributes.stream_ids[0] > 0
    assert not mask[is_state].any() and not mask[:, is_state].any()
