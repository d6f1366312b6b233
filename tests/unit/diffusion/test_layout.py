"""Rows ``[prompt | clean | state copies]``: equal to the slow loops, and reversible to the canvas."""

import itertools

import pytest
import torch

from nemo_opdlm.diffusion.layout import BlockLayout, clean_rows, row_lengths, two_stream_rows
from nemo_opdlm.diffusion.masks import AttentionRule, dense
from nemo_opdlm.diffusion.state_selection import DenoisingState, StateSelection, select_states
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.testing.oracles import oracle_row
from nemo_opdlm.testing.trajectories import MASK_TOKEN_ID, random_trajectory

BLOCK_SIZES = [1, 2, 3, 4, 8]


def states_of(trajectory: Trajectory, num_states: int = 2, name: str = "one_state_per_block") -> DenoisingState:
    return select_states(name, trajectory, MASK_TOKEN_ID, num_states=num_states, seed=0, step=1)


def all_lengths(block_size: int) -> BlockLayout:
    """Every remainder of P and of P + R, with p = 0 among them, at 0, 1 and 3 copies."""
    lengths = list(itertools.product(range(1, 2 * block_size + 2), range(1, 2 * block_size + 2), (0, 1, 3)))
    prompt_len, response_len, copies = torch.tensor(lengths).unbind(1)
    return BlockLayout(prompt_len, response_len, copies, block_size)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_lengths_equal_their_definitions(block_size: int) -> None:
    layout = all_lengths(block_size)
    columns = zip(
        *(getattr(layout, name).tolist() for name in ("prompt_len", "response_len", "num_states")),
        *(getattr(layout, name).tolist() for name in ("remainder", "prefix_len", "stream_len", "row_len")),
        strict=True,
    )
    for prompt, response, copies, remainder, prefix, stream, row in columns:
        assert remainder == prompt % block_size and prefix == prompt - remainder
        assert stream % block_size == 0 and stream - block_size < remainder + response <= stream
        assert row == prefix + stream + copies * stream


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_attributes_and_tokens_equal_the_slow_loops(block_size: int) -> None:
    layout = all_lengths(block_size)
    rows, length = layout.prompt_len.numel(), 6 * block_size
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(1, 100, (rows, length), generator=generator)
    states = torch.randint(1, 100, (rows, 3, length), generator=generator)
    token_ids, attributes = layout.gather(clean, states), layout.attributes()
    for b in range(rows):
        copies = states[b, : int(layout.num_states[b])].tolist()
        expected = oracle_row(
            clean[b].tolist(), copies, int(layout.prompt_len[b]), int(layout.response_len[b]), block_size
        )
        row_len = int(layout.row_len[b])
        assert row_len == len(expected)
        assert token_ids[b].tolist() == [t.token_id for t in expected] + [0] * (token_ids.shape[1] - row_len)
        one = attributes.map(lambda x, b=b, n=row_len: x[b, :n])  # type: ignore[misc]
        assert one.stream_ids.tolist() == [t.stream for t in expected]
        assert one.position_ids.tolist() == [t.position for t in expected]
        assert one.block_ids.tolist() == [t.position // block_size for t in expected]
        assert (one.document_ids == b).all()
        padding = attributes.stack()[b, row_len:]
        assert (padding == torch.tensor([-1, 0, 0, 0])).all()


def test_gather_lays_out_any_type_and_a_given_width() -> None:
    layout = BlockLayout(torch.tensor([5, 2]), torch.tensor([3, 1]), torch.tensor([2, 2]), 4)
    clean, states = torch.zeros(2, 8), torch.rand(2, 2, 8)
    for canvas in (states, states.double(), states > 0.5):
        row = layout.gather(clean.to(canvas.dtype), canvas, 30)
        assert row.shape == (2, 30) and row.dtype == canvas.dtype
        assert torch.equal(row[0, 8:16], canvas[0].flatten().view(2, 8)[:, 4:].flatten())
        assert not row[0, 16:].any() and not row[1, 12:].any()
    assert layout.attributes(30).block_ids.shape == (2, 30)


@pytest.mark.parametrize("name", [selection.value for selection in StateSelection])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_supervised_index_finds_every_supervised_token_in_rows_and_on_the_canvas(block_size: int, name: str) -> None:
    trajectory = random_trajectory(12, block_size)
    states = states_of(trajectory, name=name)
    rows = two_stream_rows(trajectory, states)
    row, column, document, copy, position = rows.supervised_index
    assert torch.equal(document, row)
    assert row.numel() == states.loss_mask.sum() == rows.loss_mask.sum()
    assert (rows.token_ids[row, column] == MASK_TOKEN_ID).all()
    assert torch.equal(rows.attributes.position_ids[row, column], position)
    assert torch.equal(rows.copy_ids[row, column], copy)
    assert rows.loss_mask[row, column].all() and states.loss_mask[row, copy, position].all()
    assert trajectory.is_response[row, position].all()
    flat = row * rows.token_ids.shape[1] + column
    assert (flat.diff() > 0).all(), "row-major order, nothing twice"


def test_every_row_token_is_its_canvas_token() -> None:
    trajectory = random_trajectory(9, 4)
    states = states_of(trajectory, num_states=3)
    rows = two_stream_rows(trajectory, states)
    for b, column in (rows.attributes.document_ids >= 0).nonzero().tolist():
        position, copy = int(rows.attributes.position_ids[b, column]), int(rows.copy_ids[b, column])
        canvas = trajectory.token_ids[b] if copy < 0 else states.state_ids[b, copy]
        assert rows.token_ids[b, column] == canvas[position]


def test_a_micro_batch_has_the_rows_of_the_whole_batch() -> None:
    trajectory = random_trajectory(10, 4)
    states = states_of(trajectory)
    whole = two_stream_rows(trajectory, states)
    part = torch.tensor([7, 0, 3])
    rows = two_stream_rows(trajectory.index(part), states.index(part), multiple_of=whole.token_ids.shape[1])
    assert torch.equal(rows.token_ids, whole.token_ids[part])
    assert torch.equal(rows.loss_mask, whole.loss_mask[part])
    assert torch.equal(rows.attributes.position_ids, whole.attributes.position_ids[part])
    narrow = two_stream_rows(trajectory.index(part), states.index(part))
    assert torch.equal(narrow.token_ids, rows.token_ids[:, : narrow.token_ids.shape[1]])


def test_copies_in_one_row_hold_what_rows_of_their_own_hold() -> None:
    trajectory = random_trajectory(6, 4)
    states = states_of(trajectory, num_states=3)
    together = two_stream_rows(trajectory, states)
    for copy in range(3):
        one = slice(copy, copy + 1)
        single = DenoisingState(states.state_ids[:, one], states.loss_mask[:, one], torch.ones_like(states.num_states))
        alone = two_stream_rows(trajectory, single)
        belongs = (together.copy_ids == copy) | (together.copy_ids == -1)
        for b in range(6):
            mine = belongs[b] & (together.attributes.document_ids[b] == b)
            is_token = alone.attributes.document_ids[b] == b
            for name in ("token_ids", "loss_mask"):
                expected = getattr(alone, name)[b, is_token]
                assert torch.equal(getattr(together, name)[b, mine], expected)
            assert torch.equal(together.attributes.position_ids[b, mine], alone.attributes.position_ids[b, is_token])


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_causal_copy_is_a_document_of_its_own_that_sees_what_stands_before(is_packed: bool) -> None:
    trajectory = random_trajectory(7, 4)
    states = states_of(trajectory, num_states=2)
    plain, rows = (two_stream_rows(trajectory, states, has_causal_copy=has_copy) for has_copy in (False, True))
    lengths = row_lengths(trajectory, states, has_causal_copy=True)
    assert torch.equal((rows.attributes.document_ids >= 0).sum(1), lengths)
    if is_packed:
        plain, rows = plain.packed(), rows.packed(multiple_of=16)
    is_copy = rows.attributes.document_ids >= len(trajectory)
    is_two_stream = (rows.attributes.document_ids >= 0) & ~is_copy
    for name in ("token_ids", "loss_mask"):
        expected = getattr(plain, name)[plain.attributes.document_ids >= 0]
        assert torch.equal(getattr(rows, name)[is_two_stream], expected)
    sees = dense(AttentionRule.BLOCK_DIFFUSION, rows.attributes, rows.attributes)[:, 0]
    for number in range(len(trajectory)):
        row = 0 if is_packed else number
        columns = (rows.attributes.document_ids[row] == number + len(trajectory)).nonzero()[:, 0]
        length = int(trajectory.prompt_len[number] + trajectory.response_len[number])
        assert torch.equal(rows.token_ids[row, columns], trajectory.token_ids[number, :length])
        assert torch.equal(sees[row][columns][:, columns], torch.ones(length, length, dtype=torch.bool).tril())
        assert int(sees[row][columns].sum()) == length * (length + 1) // 2, "it sees another document"
        assert int(sees[row][:, columns].sum()) == length * (length + 1) // 2, "another document sees it"
    found = rows.causal_index
    expected = [(b, int(p)) for b in range(len(trajectory)) for p in trajectory.is_response[b].nonzero()]
    assert list(zip(found.document.tolist(), found.position.tolist(), strict=True)) == expected
    judges = rows.attributes.position_ids[found.row, found.column]
    assert torch.equal(judges + 1, found.position)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_clean_rows_are_prompt_and_response_by_position(block_size: int) -> None:
    trajectory = random_trajectory(12, block_size)
    token_ids, attributes = clean_rows(trajectory)
    for b in range(len(trajectory)):
        total = int(trajectory.prompt_len[b] + trajectory.response_len[b])
        assert token_ids[b].tolist() == trajectory.token_ids[b, :total].tolist() + [0] * (token_ids.shape[1] - total)
        assert attributes.position_ids[b, :total].tolist() == list(range(total))
        assert (attributes.document_ids[b, :total] == b).all()
        assert (attributes.stack()[b, total:] == torch.tensor([-1, 0, 0, 0])).all()
    assert not attributes.stream_ids.any()
    assert torch.equal(attributes.block_ids, attributes.position_ids // block_size)
