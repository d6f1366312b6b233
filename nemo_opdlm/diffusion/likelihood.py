"""The block-diffusion bound on the likelihood of a text: which states it needs, and how much each of their tokens weighs.

A block of n tokens can be revealed one by one in n! orders. For each of them the chain rule gives the probability with which
the student writes the block in that order; the mean of its logarithm over all orders is a lower bound (Jensen) on the
logarithm of the probability with which it writes the block in a random one, and equals masked diffusion's bound with a
linear schedule. An order's factors depend only on what is still masked, so

    sum over l = 1 .. n of the mean over the sets M of l masked tokens, and over i in M, of ln p(x_i | x outside of M)

takes 2^n - 1 states where it is exact; K sets for each l where it is estimated. Log-probabilities add up over blocks, each
given the clean ones before it. What stands in the final block beyond the text is masked in every state.
"""

from dataclasses import dataclass
from math import comb

import torch
from torch import Tensor

from nemo_opdlm.diffusion.state_selection import DenoisingState
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.rng import Stream, uniform


@dataclass(frozen=True)
class LikelihoodStates:
    """States of B texts, and what makes a bound of the log-probabilities of their masked tokens.

    Attributes:
        states: the states, C copies of each text.
        weight: fp32 ``[B, C, L]`` of each masked token's log-probability.
        num_samples: K, draws that share out the copies; 1 where the states are all there are.
        block_size: tokens of a block.
    """

    states: DenoisingState
    weight: Tensor
    num_samples: int
    block_size: int

    def bound(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """The bound on each text's log-probability in nats and its standard error, fp64 ``[B]`` each.

        Args:
            log_probs: of the tokens masked in each copy, ``[B, C, L]``; others are ignored.
        """
        masked = log_probs.double().masked_fill(~self.states.loss_mask, 0.0) * self.weight
        by_block = masked.unflatten(2, (-1, self.block_size)).sum(-1)
        draws = by_block.unflatten(1, (self.num_samples, -1))
        if self.num_samples == 1:
            return draws.sum((1, 2, 3)), draws.new_zeros(len(draws))
        # Sets of different sizes and of different blocks are drawn independently: the variances of their means add up.
        variance = draws.var(1).sum((1, 2)) / self.num_samples
        return draws.mean(1).sum((1, 2)), variance.sqrt()


def is_exact(block_size: int, num_samples: int) -> bool:
    """Whether all states of a block are no more than those that would be drawn."""
    return (1 << block_size) - 1 <= num_samples * block_size


def num_states(block_size: int, num_samples: int) -> int:
    """Copies that the states of a text take."""
    return min((1 << block_size) - 1, num_samples * block_size)


def likelihood_states(trajectory: Trajectory, mask_token_id: int, *, num_samples: int, seed: int) -> LikelihoodStates:
    """All states of each block, or ``num_samples`` random ones for each number of masks where those are fewer.

    Raises:
        ValueError: one sample, which has no standard error.
    """
    block_size = trajectory.block_size
    if is_exact(block_size, num_samples):
        is_masked, weight = _all_sets(_blocks(trajectory.is_response, block_size))
        num_samples = 1
    elif num_samples < 2:
        raise ValueError(f"num_samples={num_samples} must be at least 2 with blocks of {block_size} tokens")
    else:
        is_masked, weight = _random_sets(trajectory, num_samples, seed)
    is_masked, weight = is_masked.flatten(-2), weight[..., None].expand(is_masked.shape).flatten(-2)
    positions = torch.arange(is_masked.shape[-1], device=is_masked.device)
    text_end = trajectory.prompt_len + trajectory.response_len
    is_beyond = (positions >= text_end[:, None]) & (positions < trajectory.row_end[:, None])
    hidden = is_masked | is_beyond[:, None]
    state_ids = trajectory.token_ids[:, None].expand_as(hidden).masked_fill(hidden, mask_token_id)
    counts = torch.full_like(trajectory.prompt_len, is_masked.shape[1])
    return LikelihoodStates(DenoisingState(state_ids, is_masked, counts), weight, num_samples, block_size)


def _all_sets(is_judged: Tensor) -> tuple[Tensor, Tensor]:
    """Every set of masks of each block, bool ``[B, 2^b - 1, L/b, b]``, and the weight of its tokens ``[B, 2^b - 1, L/b]``.

    In blocks that are judged in part, most of the sets have no place.
    """
    block_size = is_judged.shape[-1]
    numbers = torch.arange(1, 2**block_size, device=is_judged.device)
    sets = (numbers[:, None] >> torch.arange(block_size, device=numbers.device)) & 1 == 1
    fits = ~(sets[None, :, None] & ~is_judged[:, None]).any(-1)
    sizes = sets.sum(-1)[:, None].expand(fits.shape)
    num_judged = is_judged.sum(-1)[:, None].expand(fits.shape)
    # Of n judged tokens, comb(n, size) sets of this size, each with that many tokens, share the weight 1.
    table = [
        [1 / (k * comb(n, k)) if 1 <= k <= n else 0.0 for k in range(block_size + 1)] for n in range(block_size + 1)
    ]
    weight = torch.tensor(table, device=is_judged.device)[num_judged, sizes]
    return sets[None, :, None] & fits[..., None], weight * fits


def _random_sets(trajectory: Trajectory, num_samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """K sets of each size in each block, bool ``[B, K * b, L/b, b]``, and the weight of its tokens ``[B, K * b, L/b]``."""
    block_size, device = trajectory.block_size, trajectory.token_ids.device
    positions = torch.arange(trajectory.token_ids.shape[1], device=device)
    copies = torch.arange(num_samples * block_size, device=device)
    draw = uniform(seed, Stream.EVALUATION, 0, trajectory.sample_ids[:, None, None], positions, copies[:, None])
    is_judged = _blocks(trajectory.is_response, block_size)[:, None]
    draw = _blocks(draw, block_size).masked_fill(~is_judged, 2.0)
    sizes = (copies % block_size + 1)[:, None]
    fits = sizes <= is_judged.sum(-1)
    is_masked = (draw.argsort(-1).argsort(-1) < sizes[..., None]) & fits[..., None]
    return is_masked, (fits / sizes).float()


def _blocks(canvas: Tensor, block_size: int) -> Tensor:
    return canvas.reshape(*canvas.shape[:-1], -1, block_size)
