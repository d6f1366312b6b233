"""Which states are trained: only visited ones, each as likely as the others, supervised at real response masks."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_opdlm.diffusion.sampler import rollout
from nemo_opdlm.diffusion.state_selection import (
    DenoisingState,
    StateSelection,
    all_states,
    one_state_per_block,
    random_mask,
    revealed_from,
    select_states,
)
from nemo_opdlm.diffusion.trajectory import NEVER_UNMASKED, FinishReason, Trajectory
from nemo_opdlm.testing.oracles import oracle_masked_sets
from nemo_opdlm.testing.trajectories import (
    MASK_TOKEN_ID,
    fake_denoiser,
    random_requests,
    random_trajectory,
    rollout_settings,
)

BLOCK_SIZES = [1, 2, 3, 4, 8]
SELECTIONS = list(StateSelection)


def select(name: str, trajectory: Trajectory, num_states: int = 2, exclude_end_token: bool = False) -> DenoisingState:
    return select_states(
        name,
        trajectory,
        MASK_TOKEN_ID,
        num_states=num_states,
        seed=0,
        step=1,
        exclude_end_token=exclude_end_token,
    )


def oracle_states_of(trajectory: Trajectory, row: int) -> dict[int, list[frozenset[int]]]:
    steps = trajectory.unmask_step[row].tolist()
    prompt_len, response_len = int(trajectory.prompt_len[row]), int(trajectory.response_len[row])
    return oracle_masked_sets(steps, prompt_len, response_len, trajectory.block_size)


def masked_set(state: DenoisingState, row: int, copy: int, start: int, block_size: int) -> frozenset[int]:
    block = state.state_ids[row, copy, start : start + block_size]
    return frozenset((start + (block == MASK_TOKEN_ID).nonzero()[:, 0]).tolist())


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_one_state_per_block_takes_states_of_the_trajectory(block_size: int) -> None:
    trajectory = random_trajectory(16, block_size)
    states = one_state_per_block(trajectory, MASK_TOKEN_ID, num_states=3, seed=0, step=1)
    assert states.num_states.tolist() == [3] * 16
    for row in range(16):
        for start, possible in oracle_states_of(trajectory, row).items():
            for copy in range(3):
                assert masked_set(states, row, copy, start, block_size) in possible


@pytest.mark.parametrize("exclude_end_token", [False, True])
@pytest.mark.parametrize("name", [StateSelection.ONE_STATE_PER_BLOCK, StateSelection.ALL_STATES])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_revealed_tokens_are_those_of_the_forward_that_saw_the_state(
    block_size: int, name: str, exclude_end_token: bool
) -> None:
    trajectory = random_trajectory(16, block_size)
    states = select(name, trajectory, exclude_end_token=exclude_end_token)
    revealed = revealed_from(trajectory, states)
    for row, copy, position in states.loss_mask.nonzero().tolist():
        start = position - position % block_size
        masked = masked_set(states, row, copy, start, block_size)
        forward = min(int(trajectory.unmask_step[row, i]) for i in masked)
        assert bool(revealed[row, copy, position]) == (int(trajectory.unmask_step[row, position]) == forward)
    assert not (revealed & ~states.loss_mask).any() and revealed.any()


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_selected_states_were_seen_by_the_network(block_size: int) -> None:
    denoiser = fake_denoiser(block_size)
    trajectory = rollout(denoiser, random_requests(12, block_size), rollout_settings(block_size))
    states = one_state_per_block(trajectory, MASK_TOKEN_ID, num_states=4, seed=0, step=1)
    for row in range(12):
        visited = set(denoiser.visited_states(row))
        for start in oracle_states_of(trajectory, row):
            for copy in range(4):
                block = tuple(states.state_ids[row, copy, start : start + block_size].tolist())
                assert (start, block) in visited


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_all_states_are_the_states_of_every_block_once(block_size: int) -> None:
    trajectory = random_trajectory(16, block_size)
    states = all_states(trajectory, MASK_TOKEN_ID)
    most = [max(map(len, oracle_states_of(trajectory, row).values())) for row in range(16)]
    assert states.num_states.tolist() == most and states.state_ids.shape[1] == max(most)
    for row in range(16):
        for start, possible in oracle_states_of(trajectory, row).items():
            copies = [masked_set(states, row, copy, start, block_size) for copy in range(max(most))]
            assert copies == possible + [frozenset()] * (max(most) - len(possible))


def copies_of_one_trajectory(num: int) -> Trajectory:
    """As many samples with the same text: block 4..7 has three states, block 8..11 two."""
    steps = [0, 0, 0, 0, 3, 1, 2, 1, 5, 4, 4, 5]
    lengths = {"prompt_len": 4, "response_len": 8, "finish_reason": FinishReason.LENGTH, "num_forwards": 5}
    return Trajectory(
        token_ids=torch.ones(num, 12, dtype=torch.int64),
        unmask_step=torch.tensor(steps, dtype=torch.int32).expand(num, -1),
        confidence=torch.zeros(num, 12),
        sample_ids=torch.arange(num),
        block_size=4,
        **{name: torch.full((num,), int(value)) for name, value in lengths.items()},
    )


def test_the_states_of_a_block_are_equally_likely_and_blocks_and_copies_independent() -> None:
    num = 3000
    trajectory = copies_of_one_trajectory(num)
    states = one_state_per_block(trajectory, MASK_TOKEN_ID, num_states=2, seed=0, step=1)
    num_masked = (states.state_ids == MASK_TOKEN_ID).view(num, 2, 3, 4).sum(-1)
    assert not num_masked[:, :, 0].any()
    counts = Counter(tuple(draw) for draw in num_masked[:, :, 1:].flatten(1).tolist())
    # (first copy, second copy) x (first block in {4, 2, 1} masks, second block in {4, 2}): 36 outcomes.
    outcomes = [(a, x, c, y) for a in (4, 2, 1) for x in (4, 2) for c in (4, 2, 1) for y in (4, 2)]
    assert set(counts) == set(outcomes)
    chi_square = sum((counts[outcome] - num / 36) ** 2 / (num / 36) for outcome in outcomes)
    assert chi_square < 35 + 5 * (2 * 35) ** 0.5


def test_random_masks_spread_evenly_over_positions_and_independently_over_blocks_and_copies() -> None:
    num = 3000
    states = random_mask(copies_of_one_trajectory(num), MASK_TOKEN_ID, num_states=2, seed=0, step=1)
    masked = states.loss_mask[:, :, 4:].double()
    # t ~ U(0, 1), and one position of four where none was drawn, which happens with probability 1/5.
    torch.testing.assert_close(masked.mean(0), torch.full((2, 8), 0.55, dtype=torch.float64), atol=0.05, rtol=0)
    share = masked.view(num, 2, 2, 4).mean(-1).flatten(1)
    correlation = share.T.corrcoef() - torch.eye(4)
    assert correlation.abs().max() < 5 / num**0.5


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_loss_positions_are_the_masked_real_response_positions(block_size: int, name: str) -> None:
    trajectory = random_trajectory(16, block_size)
    for exclude in (False, True):
        states = select(name, trajectory, exclude_end_token=exclude)
        is_masked = states.state_ids == MASK_TOKEN_ID
        supervised = is_masked & trajectory.is_response[:, None]
        if exclude:
            supervised &= ~trajectory.is_end_token[:, None]
        assert torch.equal(states.loss_mask, supervised)
        beyond = torch.arange(is_masked.shape[-1]) >= trajectory.row_end[:, None]
        assert not (is_masked & beyond[:, None]).any()
        clean = trajectory.token_ids[:, None].expand_as(states.state_ids)
        assert torch.equal(states.state_ids[~is_masked], clean[~is_masked])


@pytest.mark.parametrize("name", ["one_state_per_block", "random_mask"])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_every_response_block_of_every_copy_has_a_supervised_mask(block_size: int, name: str) -> None:
    trajectory = random_trajectory(16, block_size)
    states = select(name, trajectory, num_states=3)
    supervised = states.loss_mask.view(16, 3, -1, block_size).any(-1)
    has_response = trajectory.is_response.view(16, 1, -1, block_size).any(-1)
    assert torch.equal(supervised, has_response.expand_as(supervised))


def test_a_response_of_the_end_token_alone_is_one_supervised_position_or_a_counted_zero_row() -> None:
    trajectory = random_trajectory(40, 4, end_bias=4.0)
    alone = (trajectory.response_len == 1) & (trajectory.finish_reason == FinishReason.END_OF_TURN)
    assert alone.any()
    for name in SELECTIONS:
        states, excluded = select(name, trajectory, 1), select(name, trajectory, 1, exclude_end_token=True)
        assert (states.loss_mask[alone].sum((1, 2)) == 1).all()
        assert not excluded.loss_mask[alone].any() and (excluded.num_states[alone] == 1).all()
        cut = trajectory.finish_reason == FinishReason.LENGTH
        assert torch.equal(states.loss_mask[cut], excluded.loss_mask[cut])


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_sample_has_the_same_states_in_any_batch(name: str) -> None:
    trajectory = random_trajectory(10, 4)
    rows = torch.tensor([8, 1, 5])
    together, alone = select(name, trajectory), select(name, trajectory.index(rows))
    copies = alone.state_ids.shape[1]
    picked = together.index(rows)
    assert torch.equal(alone.state_ids, picked.state_ids[:, :copies])
    assert torch.equal(alone.loss_mask, picked.loss_mask[:, :copies])
    assert torch.equal(alone.num_states, picked.num_states) and len(picked) == 3


@pytest.mark.parametrize("name", ["one_state_per_block", "random_mask"])
def test_the_draw_follows_seed_step_and_sample_only(name: str) -> None:
    trajectory = random_trajectory(10, 4)

    def draw(trajectory: Trajectory, num_states: int = 2, seed: int = 3, step: int = 7, epoch: int = 0) -> Tensor:
        options = {"num_states": num_states, "seed": seed, "step": step, "epoch": epoch}
        return select_states(name, trajectory, MASK_TOKEN_ID, **options).state_ids

    base = draw(trajectory)
    assert torch.equal(draw(trajectory), base)
    assert torch.equal(draw(trajectory, num_states=5)[:, :2], base)
    # A later pass over the rollouts takes the copies that come after those of the passes before it.
    assert torch.equal(draw(trajectory, epoch=1), draw(trajectory, num_states=4)[:, 2:])
    renamed = replace(trajectory, sample_ids=trajectory.sample_ids + 100)
    for other in (draw(trajectory, seed=4), draw(trajectory, step=8), draw(renamed)):
        assert not torch.equal(other, base)


def test_random_mask_keeps_the_rest_of_the_final_block_unless_no_forward_revealed_it() -> None:
    sampled = random_trajectory(16, 4)
    rest = (torch.arange(sampled.token_ids.shape[1]) < sampled.row_end[:, None]) & ~sampled.is_response
    rest &= sampled.unmask_step > 0
    assert rest.any()
    states = random_mask(sampled, MASK_TOKEN_ID, seed=0, step=1)
    assert not (states.state_ids[:, 0][rest] == MASK_TOKEN_ID).any()
    written = replace(sampled, unmask_step=sampled.unmask_step.masked_fill(rest, NEVER_UNMASKED))
    states = random_mask(written, MASK_TOKEN_ID, seed=0, step=1)
    assert (states.state_ids[:, 0][rest] == MASK_TOKEN_ID).all() and not states.loss_mask[:, 0][rest].any()


@pytest.mark.parametrize("name", ["one_state_per_block", "all_states"])
def test_a_response_without_unmask_steps_is_refused_not_guessed(name: str) -> None:
    trajectory = random_trajectory(4, 4)
    unknown = trajectory.unmask_step.masked_fill(trajectory.is_response, NEVER_UNMASKED)
    with pytest.raises(ValueError, match="no denoising states"):
        select(name, replace(trajectory, unmask_step=unknown))


def test_unknown_selections_and_wrong_shapes_are_refused() -> None:
    trajectory = random_trajectory(4, 4)
    with pytest.raises(ValueError, match="coupled.*one_state_per_block"):
        select("coupled", trajectory)
    states = select("one_state_per_block", trajectory)
    with pytest.raises(ValueError, match="num_states"):
        DenoisingState(states.state_ids, states.loss_mask, states.num_states[:2])
