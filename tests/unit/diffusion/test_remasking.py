"""Which masks are revealed: the table of strategies, row by row, and never a committed position."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from nemo_opdlm.diffusion.proposal import Proposal
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy, positions_to_reveal, quota
from nemo_opdlm.testing.oracles import OracleProposal, oracle_quota, oracle_reveal

STRATEGIES = list(RemaskingStrategy)
STATIC, DYNAMIC = RemaskingStrategy.LOW_CONFIDENCE_STATIC, RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC


def random_case(block_size: int, rows: int = 64, seed: int = 0) -> tuple[Proposal, Tensor, Tensor, Tensor]:
    """Proposal, masks (some rows without any), quotas and uniform numbers; confidences and entropies have ties."""
    generator = torch.Generator().manual_seed(seed)
    confidence = torch.randint(0, 8, (rows, block_size), generator=generator) / 8
    entropy = torch.randint(0, 5, (rows, block_size), generator=generator) / 16
    masked = torch.rand(rows, block_size, generator=generator) < torch.rand(rows, 1, generator=generator)
    quotas = torch.randint(0, block_size + 2, (rows,), generator=generator)
    uniform = torch.rand(rows, block_size, generator=generator)
    return Proposal(torch.zeros_like(masked).long(), confidence, entropy), masked, quotas, uniform


def revealed(params: RemaskingParams, proposal: Proposal, masked: Tensor, quotas: Tensor, uniform: Tensor) -> Tensor:
    """Positions to reveal, with random numbers that only the random strategy may ask for."""

    def draw() -> Tensor:
        assert params.strategy is RemaskingStrategy.RANDOM
        return uniform

    return positions_to_reveal(params, proposal, masked, quotas, draw)


def as_oracle(proposal: Proposal, row: int, masked: Tensor) -> dict[int, OracleProposal]:
    return {
        i: OracleProposal(0, float(proposal.confidence[row, i]), float(proposal.entropy[row, i]))
        for i in masked[row].nonzero()[:, 0].tolist()
    }


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("block_size", [1, 2, 4, 7])
def test_equals_the_slow_loops(strategy: RemaskingStrategy, block_size: int) -> None:
    proposal, masked, quotas, uniform = random_case(block_size)
    for threshold, bound in ((0.0, 0.0), (0.5, 0.35), (0.9, 0.125), (1.0, 10.0)):
        params = RemaskingParams(strategy, threshold, bound)
        actual = revealed(params, proposal, masked, quotas, uniform)
        assert actual.shape == masked.shape and actual.dtype == torch.bool
        for row in range(len(masked)):
            proposals = as_oracle(proposal, row, masked)
            random = dict(enumerate(uniform[row].tolist()))
            expected = oracle_reveal(params, proposals, int(quotas[row]), random) if proposals else set()
            assert set(actual[row].nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_reveals_masks_only_and_at_least_one_where_any_is_left(strategy: RemaskingStrategy) -> None:
    proposal, masked, quotas, uniform = random_case(5, seed=1)
    reveal = revealed(RemaskingParams(strategy), proposal, masked, quotas, uniform)
    assert not (reveal & ~masked).any()
    assert torch.equal(reveal.any(-1), masked.any(-1))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_broken_proposals_do_not_stall_a_block(strategy: RemaskingStrategy) -> None:
    _, masked, quotas, uniform = random_case(5, seed=2)
    broken = torch.full(masked.shape, math.nan)
    proposal = Proposal(torch.zeros_like(masked).long(), broken, broken)
    reveal = revealed(RemaskingParams(strategy), proposal, masked, quotas, uniform)
    assert not (reveal & ~masked).any()
    assert torch.equal(reveal.any(-1), masked.any(-1))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_does_not_depend_on_the_other_rows(strategy: RemaskingStrategy) -> None:
    proposal, masked, quotas, uniform = random_case(4, seed=3)
    params = RemaskingParams(strategy, 0.5)
    together = revealed(params, proposal, masked, quotas, uniform)
    for row in range(0, len(masked), 7):
        one = slice(row, row + 1)
        alone = Proposal(proposal.token_ids[one], proposal.confidence[one], proposal.entropy[one])
        assert torch.equal(revealed(params, alone, masked[one], quotas[one], uniform[one]), together[one])


def test_threshold_one_is_static_and_threshold_zero_reveals_everything() -> None:
    proposal, masked, quotas, uniform = random_case(6, seed=4)
    certain = Proposal(proposal.token_ids, proposal.confidence.clamp(min=0.01), proposal.entropy)
    arguments = (certain, masked, quotas, uniform)
    static = revealed(RemaskingParams(STATIC), *arguments)
    assert torch.equal(revealed(RemaskingParams(DYNAMIC, 1.0), *arguments), static)
    assert torch.equal(revealed(RemaskingParams(DYNAMIC, 0.0), *arguments), masked)


@pytest.mark.parametrize("strategy", [STATIC, RemaskingStrategy.SEQUENTIAL, RemaskingStrategy.RANDOM])
def test_quota_strategies_reveal_the_quota_or_what_is_left(strategy: RemaskingStrategy) -> None:
    proposal, masked, quotas, uniform = random_case(6, seed=5)
    reveal = revealed(RemaskingParams(strategy), proposal, masked, quotas, uniform)
    assert torch.equal(reveal.sum(-1), torch.minimum(quotas.clamp(min=1), masked.sum(-1)))


def test_random_positions_are_equally_likely() -> None:
    rows = 6000
    uniform = torch.rand(rows, 5, generator=torch.Generator().manual_seed(6))
    masked = torch.tensor([True, False, True, True, True]).expand(rows, -1)
    zeros = torch.zeros(rows, 5)
    proposal, one = Proposal(zeros.long(), zeros, zeros), torch.ones(rows).long()
    reveal = revealed(RemaskingParams(RemaskingStrategy.RANDOM), proposal, masked, one, uniform)
    expected = torch.tensor([0.25, 0, 0.25, 0.25, 0.25])
    torch.testing.assert_close(reveal.float().mean(0), expected, atol=5 * (0.19 / rows) ** 0.5, rtol=0)


def test_entropy_bound_is_a_strict_bound_on_the_sum_that_includes_the_position() -> None:
    entropy = torch.tensor([[0.25, 0.0, 0.125, 0.5]])
    masked = torch.ones(1, 4, dtype=torch.bool)
    proposal = Proposal(masked.long(), entropy, entropy)
    for bound, expected in (
        (0.0, [1]),
        (0.125, [1]),
        (0.126, [1, 2]),
        (0.375, [1, 2]),
        (0.4, [0, 1, 2]),
        (1, [0, 1, 2, 3]),
    ):
        params = RemaskingParams(RemaskingStrategy.ENTROPY_BOUNDED, entropy_bound=bound)
        reveal = revealed(params, proposal, masked, torch.ones(1).long(), entropy)
        assert reveal[0].nonzero()[:, 0].tolist() == expected, bound


@pytest.mark.parametrize(("block_size", "steps"), itertools.product(range(1, 9), range(1, 11)))
def test_quotas_add_up_to_a_block(block_size: int, steps: int) -> None:
    quotas = quota(block_size, steps).tolist()
    assert quotas == oracle_quota(block_size, steps)
    assert sum(quotas) == block_size and quotas == sorted(quotas, reverse=True)


def test_strategies_have_names_and_ranges() -> None:
    assert RemaskingParams("sequential").strategy is RemaskingStrategy.SEQUENTIAL  # type: ignore[arg-type]
    for arguments in ({"strategy": "top"}, {"threshold": 1.5}, {"threshold": math.nan}, {"entropy_bound": -1.0}):
        with pytest.raises(
            ValueError, match=next(iter(arguments)) if "strategy" not in arguments else "top.*sequential"
        ):
            RemaskingParams(**{"strategy": STATIC, **arguments})  # type: ignore[arg-type]
