"""The record of a rollout: contradictions are refused, and nothing is lost on the way to the trainer."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from nemo_opdlm.diffusion.trajectory import NEVER_UNMASKED, FinishReason, Trajectory
from nemo_opdlm.testing.trajectories import MASK_TOKEN_ID, random_trajectory

N = NEVER_UNMASKED


def small() -> Trajectory:
    """Block size 4. Row 0: P = 3, R = 4, one token behind the end; row 1: P = 4, R = 2, cut by its limit."""
    return Trajectory(
        token_ids=torch.tensor([[1, 2, 3, 4, 5, 6, 9, 7], [1, 2, 3, 4, 5, 6, 7, 8]]),
        prompt_len=torch.tensor([3, 4]),
        response_len=torch.tensor([4, 2]),
        unmask_step=torch.tensor([[0, 0, 0, 1, 3, 2, 2, 3], [0, 0, 0, 0, 1, 1, 2, N]], dtype=torch.int32),
        confidence=torch.tensor([[0, 0, 0, 0.5, 1, 0.25, 0.5, 0.5], [0, 0, 0, 0, 0.5, 0.5, 0.5, 0]]),
        finish_reason=torch.tensor([FinishReason.END_OF_TURN, FinishReason.LENGTH]),
        num_forwards=torch.tensor([3, 2]),
        sample_ids=torch.tensor([17, 4]),
        block_size=4,
    )


def assert_same(actual: Trajectory, expected: Trajectory) -> None:
    for field in fields(Trajectory):
        value, other = getattr(actual, field.name), getattr(expected, field.name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, field.name


def test_response_positions_and_end_tokens() -> None:
    trajectory = small()
    assert len(trajectory) == 2
    assert trajectory.row_end.tolist() == [8, 8]
    assert trajectory.is_response.nonzero().tolist() == [[0, 3], [0, 4], [0, 5], [0, 6], [1, 4], [1, 5]]
    assert trajectory.is_end_token.nonzero().tolist() == [[0, 6]]


def test_state_at_masks_what_this_forward_or_a_later_one_revealed() -> None:
    M = MASK_TOKEN_ID
    assert small().state_at(1, M).tolist() == [[1, 2, 3, M, M, M, M, M], [1, 2, 3, 4, M, M, M, M]]
    assert small().state_at(2, M).tolist() == [[1, 2, 3, 4, M, M, M, M], [1, 2, 3, 4, 5, 6, M, M]]
    assert small().state_at(3, M).tolist() == [[1, 2, 3, 4, M, 6, 9, M], [1, 2, 3, 4, 5, 6, 7, M]]
    assert small().state_at(4, M).tolist() == [[1, 2, 3, 4, 5, 6, 9, 7], [1, 2, 3, 4, 5, 6, 7, M]]
    per_row = small().state_at(torch.tensor([[1], [4]]), M)
    assert per_row[0].tolist() == small().state_at(1, M)[0].tolist()
    assert per_row[1].tolist() == small().state_at(4, M)[1].tolist()


def test_state_at_leaves_padding_alone() -> None:
    wide = Trajectory.cat([small(), random_trajectory(6, 4)])
    state = wide.state_at(1, MASK_TOKEN_ID)
    beyond = torch.arange(state.shape[1]) >= wide.row_end[:, None]
    assert beyond.any() and torch.equal(state[beyond], wide.token_ids[beyond])


def test_rows_can_be_picked_joined_and_saved() -> None:
    trajectory = random_trajectory(9, 4)
    parts = [trajectory.index(rows) for rows in torch.arange(9).split(4)]
    assert_same(Trajectory.cat(parts), trajectory)
    assert_same(trajectory.index(slice(2, 4)), trajectory.index(torch.tensor([2, 3])))
    assert_same(Trajectory.from_state_dict(trajectory.state_dict()), trajectory)
    assert_same(trajectory.to("cpu"), trajectory)


def test_cat_pads_to_the_widest_and_refuses_mixed_block_sizes() -> None:
    joined = Trajectory.cat([small(), random_trajectory(6, 4)])
    assert joined.token_ids.shape[0] == 8 and joined.token_ids.shape[1] > 8
    assert torch.equal(joined.token_ids[:2, :8], small().token_ids)
    assert (joined.unmask_step[:2, 8:] == N).all() and not joined.confidence[:2, 8:].any()
    with pytest.raises(ValueError, match="block size"):
        Trajectory.cat([small(), random_trajectory(2, 2)])


@pytest.mark.parametrize("old", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("new", [1, 2, 3, 4, 8])
def test_another_grid_keeps_prompt_and_response(old: int, new: int) -> None:
    trajectory = random_trajectory(14, old)
    resized = trajectory.with_block_size(new)
    assert resized.block_size == new and resized.token_ids.shape[1] == int(resized.row_end.max())
    for name in ("prompt_len", "response_len", "finish_reason", "num_forwards", "sample_ids"):
        assert torch.equal(getattr(resized, name), getattr(trajectory, name))
    for b in range(len(trajectory)):
        total = int(trajectory.prompt_len[b] + trajectory.response_len[b])
        for name in ("token_ids", "unmask_step", "confidence"):
            assert torch.equal(getattr(resized, name)[b, :total], getattr(trajectory, name)[b, :total])


def test_a_longer_final_block_ends_in_tokens_that_were_never_unmasked() -> None:
    trajectory = random_trajectory(14, 1).with_block_size(4)
    positions = torch.arange(trajectory.token_ids.shape[1])
    rest = positions >= (trajectory.prompt_len + trajectory.response_len)[:, None]
    assert rest.any() and (trajectory.unmask_step[rest] == N).all()


def with_step(row: int, position: int, value: int) -> dict[str, torch.Tensor]:
    step = small().unmask_step.clone()
    step[row, position] = value
    return {"unmask_step": step}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 3}, "multiple of block_size=3"),
        ({"block_size": 0}, "block_size=0"),
        ({"token_ids": torch.zeros(2, 8)}, "token_ids is torch.float32"),
        ({"unmask_step": torch.zeros(2, 7, dtype=torch.int32)}, r"unmask_step is torch.int32 \(2, 7\)"),
        ({"unmask_step": torch.zeros(2, 8, dtype=torch.int64)}, "unmask_step is torch.int64"),
        ({"sample_ids": torch.zeros(3, dtype=torch.int64)}, "sample_ids"),
        ({"prompt_len": torch.tensor([3, 0])}, "at least 1"),
        ({"response_len": torch.tensor([0, 2])}, "at least 1"),
        ({"response_len": torch.tensor([4, 5])}, r"fit the canvas; broken in rows \[1\]"),
        (with_step(0, 2, 1), r"0 in the prompt; broken in rows \[0\]"),
        (with_step(1, 5, 0), r"at least 1 after the prompt; broken in rows \[1\]"),
        (with_step(1, 5, -3), "at least 1 after the prompt"),
        ({"confidence": torch.full((2, 8), 1.5)}, "probability"),
        ({"finish_reason": torch.tensor([0, 2])}, "FinishReason"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(small(), **changes)


def test_steps_past_the_final_block_are_refused() -> None:
    with pytest.raises(ValueError, match=r"past the final block; broken in rows \[0\]"):
        replace(small(), response_len=torch.tensor([1, 2]))


def test_a_confidence_that_is_not_a_number_is_kept() -> None:
    # A network with non-finite logits is to be counted by the trainer, not to stop it here.
    confidence = small().confidence.clone()
    confidence[0, 4] = torch.nan
    assert replace(small(), confidence=confidence).confidence.isnan().sum() == 1
