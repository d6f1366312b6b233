"""Rows that share a micro-batch: nothing of one document reaches another, and little of the micro-batch is padding."""

import pytest
import torch
from torch import Tensor

from nemo_opdlm.diffusion.layout import (
    BlockLayout,
    TwoStreamRows,
    clean_rows,
    packed_clean_rows,
    share_of_columns,
    two_stream_rows,
)
from nemo_opdlm.diffusion.masks import PADDING_DOCUMENT, AttentionRule, TokenAttributes, dense
from nemo_opdlm.diffusion.packing import longest_first, pack
from nemo_opdlm.diffusion.state_selection import StateSelection, select_states
from nemo_opdlm.testing.trajectories import MASK_TOKEN_ID, random_trajectory

BLOCK_SIZE, NUM_DOCUMENTS = 4, 7
names = pytest.mark.parametrize("name", [selection.value for selection in StateSelection])


def test_every_row_is_dealt_once_and_the_shares_cost_about_the_same() -> None:
    cost = torch.randint(1, 4000, (131,), generator=torch.Generator().manual_seed(0))
    for num_shares in (1, 2, 7, 64):
        shares = longest_first(cost, num_shares)
        assert sorted(torch.cat(shares).tolist()) == list(range(131))
        load = torch.stack([cost[share].sum() for share in shares])
        # Greedy scheduling ends within one job of the mean, here the longest.
        assert int(load.max()) <= float(cost.sum()) / num_shares + int(cost.max())
        assert all(bool((cost[share].diff() <= 0).all()) for share in shares)


def test_equal_rows_keep_their_order_and_shares_beyond_them_get_none() -> None:
    shares = longest_first(torch.full((3,), 32), 5)
    assert [share.tolist() for share in shares] == [[0], [1], [2], [], []]


def realistic_rows(num_rows: int, seed: int) -> Tensor:
    """Row lengths of chat prompts of about 200 tokens and responses of about 1,100 of at most 4,000."""
    generator = torch.Generator().manual_seed(seed)
    response_len = torch.empty(num_rows).exponential_(1 / 1140, generator=generator).clamp(1, 4000).long()
    prompt_len = torch.randint(50, 350, (num_rows,), generator=generator)
    return BlockLayout(prompt_len, response_len, torch.ones_like(prompt_len), BLOCK_SIZE).row_len


@pytest.mark.parametrize("num_rows", [8, 16, 128])
@pytest.mark.parametrize("capacity", [8448, 16384, 32768])
def test_nine_of_ten_tokens_are_useful_at_realistic_lengths(num_rows: int, capacity: int) -> None:
    """Also where every pack of an update is padded to the longest, as the interleaved schedule wants it."""
    useful = padded = 0
    for seed in range(40):
        lengths = realistic_rows(num_rows, seed)
        loads = [int(lengths[rows].sum()) for rows in pack(lengths, capacity)]
        useful, padded = useful + sum(loads), padded + len(loads) * max(loads)
    assert useful >= 0.9 * padded


def test_packs_hold_every_row_once_and_never_more_than_fits() -> None:
    for seed, capacity in enumerate((8350, 9000, 20_000, 10**6)):
        lengths = realistic_rows(37, seed)
        packs = pack(lengths, capacity)
        assert sorted(torch.cat(packs).tolist()) == list(range(37))
        assert max(int(lengths[rows].sum()) for rows in packs) <= capacity
        assert [rows.tolist() for rows in pack(lengths, capacity)] == [rows.tolist() for rows in packs]
    assert [rows.tolist() for rows in pack(torch.tensor([7, 7, 7]), 7)] == [[0], [1], [2]]
    with pytest.raises(AssertionError):
        pack(torch.tensor([7, 8]), 7)


def both(name: str, multiple_of: int = 1) -> tuple[TwoStreamRows, TwoStreamRows]:
    trajectory = random_trajectory(NUM_DOCUMENTS, BLOCK_SIZE)
    states = select_states(name, trajectory, MASK_TOKEN_ID, num_states=2, seed=0, step=1)
    rows = two_stream_rows(trajectory, states)
    return rows, rows.packed(multiple_of)


def places(attributes: TokenAttributes, document: int) -> tuple[Tensor, Tensor]:
    return (attributes.document_ids == document).nonzero(as_tuple=True)


@names
def test_a_packed_document_is_its_row(name: str) -> None:
    rows, packed = both(name, multiple_of=16)
    assert packed.token_ids.shape[0] == 1 and packed.token_ids.shape[1] % 16 == 0
    for document in range(NUM_DOCUMENTS):
        here, there = places(rows.attributes, document), places(packed.attributes, document)
        assert bool((there[1].diff() == 1).all())
        assert torch.equal(rows.token_ids[here], packed.token_ids[there])
        assert torch.equal(rows.loss_mask[here], packed.loss_mask[there])
        assert torch.equal(rows.attributes.stack()[here], packed.attributes.stack()[there])
    padding = places(packed.attributes, PADDING_DOCUMENT)
    assert 0 < padding[0].numel() < 16
    assert (packed.attributes.stack()[padding] == torch.tensor([PADDING_DOCUMENT, 0, 0, 0])).all()
    assert not packed.token_ids[padding].any() and not packed.loss_mask[padding].any()


@names
def test_the_packed_mask_is_that_of_each_row_and_empty_across_documents(name: str) -> None:
    rows, packed = both(name, multiple_of=16)
    mask = dense(AttentionRule.BLOCK_DIFFUSION, packed.attributes, packed.attributes)[0, 0]
    expected = torch.zeros_like(mask)
    alone = dense(AttentionRule.BLOCK_DIFFUSION, rows.attributes, rows.attributes)[:, 0]
    for document in range(NUM_DOCUMENTS):
        here, there = places(rows.attributes, document)[1], places(packed.attributes, document)[1]
        expected[there[:, None], there] = alone[document][here[:, None], here]
    padding = places(packed.attributes, PADDING_DOCUMENT)[1]
    expected[padding[:, None], padding] = True
    assert torch.equal(mask, expected)


@names
def test_packed_supervision_is_that_of_the_rows(name: str) -> None:
    rows, packed = both(name)
    here, there = rows.supervised_index, packed.supervised_index
    assert torch.equal(here.document, here.row) and not there.row.any()
    for field in ("document", "copy", "position"):
        assert torch.equal(getattr(here, field), getattr(there, field))
    assert torch.equal(rows.token_ids[here.row, here.column], packed.token_ids[there.row, there.column])


def test_shares_of_packed_columns_hold_every_supervised_token_once() -> None:
    _, packed = both("one_state_per_block", multiple_of=8)
    found = []
    for rank in range(2):
        share = packed.columns(share_of_columns(packed.token_ids.shape[1], rank, 2))
        index = share.supervised_index
        assert (share.token_ids[index.row, index.column] == MASK_TOKEN_ID).all()
        found += list(zip(index.document.tolist(), index.copy.tolist(), index.position.tolist(), strict=True))
    index = packed.supervised_index
    expected = zip(index.document.tolist(), index.copy.tolist(), index.position.tolist(), strict=True)
    assert sorted(found) == sorted(expected)


def test_packed_clean_rows_are_the_clean_rows() -> None:
    trajectory = random_trajectory(NUM_DOCUMENTS, BLOCK_SIZE)
    token_ids, attributes = clean_rows(trajectory)
    packed_ids, packed = packed_clean_rows(trajectory, multiple_of=8)
    assert packed_ids.shape == packed.position_ids.shape and packed_ids.shape[1] % 8 == 0
    for document in range(NUM_DOCUMENTS):
        here, there = places(attributes, document), places(packed, document)
        assert torch.equal(token_ids[here], packed_ids[there])
        assert torch.equal(attributes.stack()[here], packed.stack()[there])
