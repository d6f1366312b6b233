"""The block-diffusion bound: the mean of the chain rule over all orders of each block, exactly or within its stated error."""

import math
from itertools import permutations

import pytest
import torch
from torch import Tensor

from nemo_opdlm.diffusion.likelihood import LikelihoodStates, is_exact, likelihood_states
from nemo_opdlm.diffusion.trajectory import Trajectory, given_texts

MASK = 99
SHAPES = [(3, 6), (4, 4), (1, 1), (5, 9)]


def texts(block_size: int, shapes: list[tuple[int, int]] = SHAPES) -> Trajectory:
    prompts = [torch.arange(prompt_len) for prompt_len, _ in shapes]
    responses = [10 + torch.arange(response_len) for _, response_len in shapes]
    return given_texts(prompts, responses, torch.arange(len(shapes)), MASK, block_size)


def conditional(row: int, position: int, block: tuple[int, ...]) -> float:
    """An arbitrary ln p of a token, given what its block shows."""
    return -1.0 - math.sin(hash((row, position, block)) % 1000) / 2


def log_probs(likelihood: LikelihoodStates) -> Tensor:
    """The same for every masked token of every copy."""
    states, size = likelihood.states, likelihood.block_size
    values = torch.full(states.loss_mask.shape, -1e3)
    for row, copy, position in states.loss_mask.nonzero().tolist():
        start = position // size * size
        block = states.state_ids[row, copy, start : start + size]
        values[row, copy, position] = conditional(row, position, tuple(block.tolist()))
    return values


def oracle(trajectory: Trajectory, row: int) -> float:
    """The mean over all orders, block by block, written out."""
    size, tokens = trajectory.block_size, trajectory.token_ids[row].tolist()
    first, end = int(trajectory.prompt_len[row]), int(trajectory.prompt_len[row] + trajectory.response_len[row])
    total = 0.0
    for start in range(first // size * size, end, size):
        judged = [i for i in range(start, start + size) if first <= i < end]
        orders = list(permutations(judged))
        for order in orders:
            block = [tokens[i] if i < first else MASK for i in range(start, start + size)]
            for i in order:
                total += conditional(row, i, tuple(block)) / len(orders)
                block[i - start] = tokens[i]
    return total


@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
def test_all_states_give_the_mean_of_the_chain_rule_over_all_orders(block_size: int) -> None:
    trajectory = texts(block_size)
    likelihood = likelihood_states(trajectory, MASK, num_samples=4, seed=0)
    bound, error = likelihood.bound(log_probs(likelihood))
    assert bound.tolist() == pytest.approx([oracle(trajectory, row) for row in range(len(SHAPES))], abs=1e-5)
    assert error.tolist() == [0.0] * len(SHAPES)


def test_blocks_of_one_token_are_the_causal_chain_rule() -> None:
    likelihood = likelihood_states(texts(1), MASK, num_samples=2, seed=0)
    assert likelihood.states.state_ids.shape[1] == 1
    assert torch.equal(likelihood.weight[likelihood.states.loss_mask], torch.ones(sum(r for _, r in SHAPES)))


def test_all_states_are_taken_where_they_are_no_more_than_the_random_ones() -> None:
    assert [is_exact(size, 4) for size in (1, 2, 4, 5, 8, 16)] == [True, True, True, False, False, False]
    with pytest.raises(ValueError, match="num_samples=1 must be at least 2 with blocks of 8 tokens"):
        likelihood_states(texts(8), MASK, num_samples=1, seed=0)


def test_random_states_are_right_on_average_and_their_error_is_what_is_stated() -> None:
    trajectory = texts(4)
    expected = torch.tensor([oracle(trajectory, row) for row in range(len(SHAPES))], dtype=torch.float64)
    bounds, errors = [], []
    for seed in range(200):
        likelihood = likelihood_states(trajectory, MASK, num_samples=2, seed=seed)
        bound, error = likelihood.bound(log_probs(likelihood))
        bounds.append(bound)
        errors.append(error)
    found, stated = torch.stack(bounds), torch.stack(errors).square().mean(0).sqrt()
    of_mean = stated / len(bounds) ** 0.5
    assert ((found.mean(0) - expected).abs() <= 4 * of_mean + 1e-6).all()
    assert torch.allclose(found.std(0), stated, rtol=0.2, atol=1e-6)


def test_states_of_a_text_depend_on_its_number_and_not_on_its_batch() -> None:
    whole = likelihood_states(texts(8), MASK, num_samples=2, seed=0)
    alone = given_texts([torch.arange(4)], [10 + torch.arange(4)], torch.tensor([1]), MASK, 8)
    states = likelihood_states(alone, MASK, num_samples=2, seed=0).states
    assert torch.equal(states.state_ids[0], whole.states.state_ids[1, :, : states.state_ids.shape[-1]])


def test_nothing_behind_the_text_is_ever_shown_and_the_prompt_always_is() -> None:
    trajectory = texts(4)
    states = likelihood_states(trajectory, MASK, num_samples=4, seed=0).states
    for row, (prompt_len, response_len) in enumerate(SHAPES):
        assert (states.state_ids[row, :, prompt_len + response_len :] == MASK).all()
        assert torch.equal(states.state_ids[row, 0, :prompt_len], torch.arange(prompt_len))
        assert not states.loss_mask[row, :, :prompt_len].any()
