"""A vocabulary cut into shards proposes what the whole one proposes, and the same on every shard."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from nemo_opdlm.diffusion.proposal import Proposal, SamplingParams, propose
from nemo_opdlm.testing.oracles import oracle_probabilities
from nemo_opdlm.testing.threaded_vocab import on_shards
from nemo_opdlm.vocab import LocalVocab, local_columns

PADDED, V = 36, 32
PARAMS = [
    SamplingParams(temperature, top_k, top_p)
    for temperature, top_k, top_p in itertools.product((0.0, 0.7, 1.0), (0, 1, 5, 25), (1.0, 0.9, 0.4))
]
SEVERAL = pytest.mark.parametrize("num_shards", [2, 3])


def padded_logits(*shape: int, width: int = PADDED, seed: int = 0) -> Tensor:
    """Logits with four columns of padding, as a head pads its vocabulary."""
    logits = 3 * torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed))
    logits[..., -4:] = -math.inf
    return logits


def random_uniform(num: int, seed: int = 1) -> Tensor:
    return torch.rand(num, generator=torch.Generator().manual_seed(seed))


def forbid(*ids: int) -> Tensor:
    forbidden = torch.zeros(V, dtype=torch.bool)
    forbidden[list(ids)] = True
    return forbidden


def proposed_by_all(
    num_shards: int, logits: Tensor, uniform: Tensor, params: SamplingParams, forbidden: Tensor
) -> Proposal:
    """The one proposal of all shards, ``forbidden`` over the vocabulary without its padding."""
    width = logits.shape[-1] // num_shards
    proposals: list[Proposal] = on_shards(
        num_shards,
        logits.shape[-1],
        lambda vocab, columns: propose(
            logits[..., columns], uniform, params, local_columns(forbidden, width, vocab), vocab
        ),
    )
    for proposal in proposals[1:]:
        torch.testing.assert_close(vars(proposal), vars(proposals[0]), rtol=0, atol=0, equal_nan=True)
    return proposals[0]


def proposed_by_one(logits: Tensor, uniform: Tensor, params: SamplingParams, forbidden: Tensor) -> Proposal:
    vocab = LocalVocab()
    return propose(logits, uniform, params, local_columns(forbidden, logits.shape[-1], vocab), vocab)


def assert_same(actual: Proposal, expected: Proposal) -> None:
    assert torch.equal(actual.token_ids, expected.token_ids)
    torch.testing.assert_close(actual.confidence, expected.confidence)
    torch.testing.assert_close(actual.entropy, expected.entropy, atol=1e-6, rtol=1e-5)


@SEVERAL
@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.parametrize("forbidden", [(), (0, 7, 31), range(18)], ids=["nothing", "some", "whole shards"])
def test_sharded_equals_unsharded(params: SamplingParams, forbidden: tuple[int, ...], num_shards: int) -> None:
    case = padded_logits(50), random_uniform(50), params, forbid(*forbidden)
    assert_same(proposed_by_all(num_shards, *case), proposed_by_one(*case))


@SEVERAL
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.7, 700, 0.95)], ids=str)
def test_shards_of_many_chunks_equal_the_whole(params: SamplingParams, num_shards: int) -> None:
    logits = padded_logits(4, 25, width=1800)
    case = logits, random_uniform(100).reshape(4, 25), params, torch.zeros(1796, dtype=torch.bool)
    assert_same(proposed_by_all(num_shards, *case), proposed_by_one(*case))


@SEVERAL
@pytest.mark.parametrize("uniform", [0.0, 2.0**-24, 0.5, 1 - 2.0**-24, 1.0])
@pytest.mark.parametrize("allowed", [0, 11, 12, 31])
def test_the_only_allowed_token_is_proposed_wherever_it_is(allowed: int, uniform: float, num_shards: int) -> None:
    forbidden = ~forbid(allowed)
    for params in PARAMS[::4]:
        proposal = proposed_by_all(num_shards, padded_logits(3), torch.full((3,), uniform), params, forbidden)
        assert proposal.token_ids.tolist() == [allowed] * 3
        assert proposal.confidence.tolist() == [1.0] * 3
        assert proposal.entropy.tolist() == [0.0] * 3


@SEVERAL
@pytest.mark.parametrize("uniform", [0.0, 1.0])
def test_the_ends_of_the_distribution_have_positive_probability(uniform: float, num_shards: int) -> None:
    logits = padded_logits(8)
    logits[:, :13], logits[:, 20:] = -200.0, -200.0  # allowed, but their weights underflow to 0
    proposal = proposed_by_all(num_shards, logits, torch.full((8,), uniform), SamplingParams(), forbid())
    assert proposal.token_ids.tolist() == [13 if uniform == 0 else 19] * 8


@SEVERAL
@pytest.mark.parametrize("params", PARAMS[::5], ids=str)
def test_broken_logits_on_one_shard_are_reported_by_all(params: SamplingParams, num_shards: int) -> None:
    logits = padded_logits(9)
    for row, column in enumerate((0, 13, 31)):
        logits[row, column], logits[row + 3, column] = math.nan, math.inf
    logits[6], logits[7] = math.nan, -math.inf
    proposal = proposed_by_all(num_shards, logits, random_uniform(9), params, forbid(*range(20), 25))
    # Columns 0 and 13 are forbidden, so nothing is broken there.
    is_broken = [False, False, True, False, False, True, True, True, False]
    assert proposal.confidence.isnan().tolist() == proposal.entropy.isnan().tolist() == is_broken
    assert proposal.token_ids[is_broken].tolist() == [20] * 4
    for columns in (0, 13, 31):
        for broken in (math.nan, math.inf):
            logits = padded_logits(1)
            logits[:, columns] = broken
            proposal = proposed_by_all(num_shards, logits, random_uniform(1), params, forbid(1))
            assert proposal.token_ids.tolist() == [0] and bool(proposal.confidence.isnan() & proposal.entropy.isnan())


@SEVERAL
def test_nothing_allowed_is_reported_by_all(num_shards: int) -> None:
    proposal = proposed_by_all(num_shards, padded_logits(2), random_uniform(2), SamplingParams(), ~forbid())
    assert bool(proposal.confidence.isnan().all() and proposal.entropy.isnan().all())


@SEVERAL
def test_temperature_zero_takes_the_lowest_of_tied_tokens(num_shards: int) -> None:
    logits = torch.zeros(3, PADDED)
    logits[0, [5, 30]], logits[1, [13, 14, 31]] = 1.0, 1.0
    proposal = proposed_by_all(num_shards, logits, random_uniform(3), SamplingParams(0.0), forbid(0, 1))
    assert proposal.token_ids.tolist() == [5, 13, 2]


def oracle_nucleus(probabilities: list[float], top_p: float) -> set[int]:
    """Add tokens by falling probability and rising id until their mass is large enough."""
    nucleus: list[int] = []
    for token in sorted(range(len(probabilities)), key=lambda i: (-probabilities[i], i)):
        if nucleus and math.fsum(probabilities[i] for i in nucleus) >= top_p:
            break
        nucleus.append(token)
    return set(nucleus)


@pytest.mark.parametrize("num_shards", [1, 2, 3])
@pytest.mark.parametrize("top_p", [1e-9, 0.123, 0.5, 0.777, 0.95, 0.9999])
@pytest.mark.parametrize("num_levels", [1, 3, 1000])
def test_top_p_keeps_the_nucleus_of_the_oracle(num_levels: int, top_p: float, num_shards: int) -> None:
    # Few levels make many ties, of which the lowest ids are kept, across shards.
    logits = padded_logits()
    logits[:V] = (logits[:V] * num_levels / 6).round() * 2 / num_levels
    num = 500
    proposal = proposed_by_all(
        num_shards, logits.expand(num, -1), (torch.arange(num) + 0.5) / num, SamplingParams(top_p=top_p), forbid()
    )
    probabilities = logits.double().softmax(-1).tolist()
    nucleus = oracle_nucleus(probabilities, top_p)
    likely = {token for token in nucleus if probabilities[token] > 1 / num}
    assert likely <= set(proposal.token_ids.tolist()) <= nucleus
    expected = torch.tensor([p if token in nucleus else 0.0 for token, p in enumerate(probabilities)])
    expected_entropy = torch.special.entr(expected / expected.sum()).sum()
    torch.testing.assert_close(proposal.entropy, expected_entropy.expand(num), rtol=1e-4, atol=1e-6)


@SEVERAL
@pytest.mark.parametrize("params", PARAMS[12::2], ids=str)
def test_tokens_are_proposed_as_often_as_they_are_likely(params: SamplingParams, num_shards: int) -> None:
    logits, forbidden, num = padded_logits(seed=4)[:V], forbid(3, 4, 17), 1000
    padded = torch.cat([logits, torch.full((4,), -math.inf)]).expand(num, -1)
    proposal = proposed_by_all(num_shards, padded, (torch.arange(num) + 0.5) / num, params, forbidden)
    shares = proposal.token_ids.bincount(minlength=V) / num
    expected = torch.tensor(oracle_probabilities(logits.tolist(), params, forbidden.tolist()))
    torch.testing.assert_close(shares, expected, rtol=0, atol=1.01 / num)
