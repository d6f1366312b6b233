"""Which of a block's masked positions are revealed by this denoising step."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Never

import torch
from torch import Tensor

from nemo_opdlm.diffusion.proposal import Proposal


class RemaskingStrategy(StrEnum):
    """How positions are chosen; n is the quota of the denoising step, at most the masks that are left.

    - ``low_confidence_static``: the n most confident proposals.
    - ``low_confidence_dynamic``: all above the threshold, and the n most confident ones.
    - ``entropy_bounded``: by rising entropy, as many as stay below the bound in sum, at least n.
    - ``sequential``: the next n from the left.
    - ``random``: n at random.
    """

    LOW_CONFIDENCE_STATIC = "low_confidence_static"
    LOW_CONFIDENCE_DYNAMIC = "low_confidence_dynamic"
    ENTROPY_BOUNDED = "entropy_bounded"
    SEQUENTIAL = "sequential"
    RANDOM = "random"

    @classmethod
    def _missing_(cls, value: object) -> Never:
        raise ValueError(f"remasking strategy {value!r}; allowed: {[strategy.value for strategy in cls]}")


@dataclass(frozen=True)
class RemaskingParams:
    """A strategy and what it needs; raises ValueError outside the ranges.

    Attributes:
        strategy: how positions are chosen.
        threshold: gamma of ``low_confidence_dynamic``, 0 to 1.
        entropy_bound: of ``entropy_bounded``, in nats, at least 0.
    """

    strategy: RemaskingStrategy
    threshold: float = 0.9
    entropy_bound: float = 0.35

    def __post_init__(self) -> None:
        """Check the ranges and accept a strategy by its name."""
        object.__setattr__(self, "strategy", RemaskingStrategy(self.strategy))
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold={self.threshold}; allowed: 0 to 1")
        if not self.entropy_bound >= 0:
            raise ValueError(f"entropy_bound={self.entropy_bound}; allowed: at least 0")


@dataclass(frozen=True)
class Candidates:
    """One block per row, and what strategies choose by.

    Attributes:
        proposal: tokens, confidence and entropy ``[B, b]``.
        masked: bool ``[B, b]``, what may be revealed.
        quota: int64 ``[B, 1]``, at least 1.
        uniform: draws ``[B, b]``, for the random strategy.
    """

    proposal: Proposal
    masked: Tensor
    quota: Tensor
    uniform: Callable[[], Tensor]

    def highest(self, score: Tensor) -> Tensor:
        """The ``quota`` masked positions of highest score (NaN above all, ties from the left), bool ``[B, b]``."""
        order = score.masked_fill(~self.masked, -torch.inf).argsort(dim=-1, descending=True, stable=True)
        return self.masked & (_ranks(order) < self.quota)


def quota(block_size: int, denoising_steps: int) -> Tensor:
    """n_s: positions to reveal in each denoising step, int64 ``[S]``, in all b; the first b mod S reveal one more."""
    steps = torch.arange(denoising_steps)
    return block_size // denoising_steps + (steps < block_size % denoising_steps).long()


def positions_to_reveal(
    params: RemaskingParams, proposal: Proposal, masked: Tensor, quota: Tensor, uniform: Callable[[], Tensor]
) -> Tensor:
    """Masked positions to reveal now, bool ``[B, b]``: a subset of ``masked``, never empty where a mask is left.

    Args:
        params: strategy and its threshold or bound.
        proposal: for each position ``[B, b]``; read at masked ones only.
        masked: bool ``[B, b]``.
        quota: n_s of each row's denoising step, int64 ``[B]``.
        uniform: draws ``[B, b]`` random numbers; only the random strategy asks for them.
    """
    # A quota of 0 (more steps than tokens) would stall a block whose masks outlive the others.
    candidates = Candidates(proposal, masked, quota.clamp(min=1)[:, None], uniform)
    return _STRATEGIES[params.strategy](params, candidates)


def _static(params: RemaskingParams, candidates: Candidates) -> Tensor:
    return candidates.highest(candidates.proposal.confidence)


def _dynamic(params: RemaskingParams, candidates: Candidates) -> Tensor:
    is_sure = candidates.masked & (candidates.proposal.confidence > params.threshold)
    return is_sure | _static(params, candidates)


def _entropy_bounded(params: RemaskingParams, candidates: Candidates) -> Tensor:
    # Non-finite entropies must sort before the excluded positions, or a block could stall.
    entropy = candidates.proposal.entropy.nan_to_num(nan=torch.finfo(torch.float32).max)
    entropy = entropy.masked_fill(~candidates.masked, torch.inf)
    rising, order = entropy.sort(dim=-1, stable=True)
    is_within = rising.cumsum(-1) < params.entropy_bound
    rank = _ranks(order)
    # The quota keeps the number of denoising steps a bound where it is smaller than the block; else it is one.
    return candidates.masked & (is_within.gather(-1, rank) | (rank < candidates.quota))


def _sequential(params: RemaskingParams, candidates: Candidates) -> Tensor:
    return candidates.highest(torch.zeros_like(candidates.proposal.confidence))


def _random(params: RemaskingParams, candidates: Candidates) -> Tensor:
    return candidates.highest(candidates.uniform())


_STRATEGIES: dict[RemaskingStrategy, Callable[[RemaskingParams, Candidates], Tensor]] = {
    RemaskingStrategy.LOW_CONFIDENCE_STATIC: _static,
    RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC: _dynamic,
    RemaskingStrategy.ENTROPY_BOUNDED: _entropy_bounded,
    RemaskingStrategy.SEQUENTIAL: _sequential,
    RemaskingStrategy.RANDOM: _random,
}


def _ranks(order: Tensor) -> Tensor:
    """Rank of each position, from the positions in their order: the inverse permutation."""
    return order.argsort(-1)
