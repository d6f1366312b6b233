"""From logits and one uniform number to a token: the right distribution, and never a forbidden token."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_opdlm.diffusion.proposal import Proposal, SamplingParams, WorkingMemory, propose
from nemo_opdlm.testing.oracles import oracle_probabilities, oracle_propose
from nemo_opdlm.vocab import LocalVocab

LARGEST_UNIFORM = 1 - 2.0**-24
WHOLE = LocalVocab()
NOTHING = torch.zeros(9, dtype=torch.bool)
PARAMS = [
    SamplingParams(temperature, top_k, top_p)
    for temperature, top_k, top_p in itertools.product((0.0, 0.3, 1.0, 1.7), (0, 1, 3, 50), (1.0, 0.9, 0.4, 1e-6))
]


def random_logits(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid_of(num: int) -> Tensor:
    """``num`` numbers spread evenly over [0, 1)."""
    return (torch.arange(num) + 0.5) / num


def token_shares(logits: Tensor, params: SamplingParams, forbidden: Tensor, num: int = 4000) -> Tensor:
    """How often each token of one distribution is proposed by evenly spread uniform numbers."""
    proposal = propose(logits.expand(num, -1), grid_of(num), params, forbidden, WHOLE)
    return proposal.token_ids.bincount(minlength=logits.numel()) / num


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_equals_the_slow_loops(params: SamplingParams) -> None:
    logits, forbidden = random_logits(20, 9), NOTHING.clone()
    forbidden[[2, 8]] = True
    uniform = grid_of(20)[torch.randperm(20, generator=torch.Generator().manual_seed(1))]
    actual = propose(logits, uniform, params, forbidden, WHOLE)
    for i in range(20):
        expected = oracle_propose(logits[i].tolist(), float(uniform[i]), params, forbidden.tolist())
        assert actual.token_ids[i] == expected.token_id
        assert float(actual.confidence[i]) == pytest.approx(expected.confidence, rel=1e-5)
        assert float(actual.entropy[i]) == pytest.approx(expected.entropy, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("vocab_size", [256, 700, 1024])
@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.7, 300, 0.95)], ids=str)
def test_a_long_vocabulary_is_walked_in_the_order_of_its_ids(params: SamplingParams, vocab_size: int) -> None:
    logits, forbidden = random_logits(8, vocab_size), torch.zeros(vocab_size, dtype=torch.bool)
    forbidden[100:600] = True
    actual = propose(logits, grid_of(8), params, forbidden, WHOLE)
    for i in range(8):
        expected = oracle_propose(logits[i].tolist(), float(grid_of(8)[i]), params, forbidden.tolist())
        assert actual.token_ids[i] == expected.token_id
        assert float(actual.entropy[i]) == pytest.approx(expected.entropy, rel=1e-4)


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_tokens_are_proposed_as_often_as_they_are_likely(params: SamplingParams) -> None:
    logits, forbidden = random_logits(9, seed=4), NOTHING.clone()
    forbidden[logits.argmax()] = True
    expected = torch.tensor(oracle_probabilities(logits.tolist(), params, forbidden.tolist()))
    torch.testing.assert_close(token_shares(logits, params, forbidden), expected, rtol=0, atol=1.01 / 4000)


@pytest.mark.parametrize("uniform", [0.0, 2.0**-24, 0.5, LARGEST_UNIFORM, 1.0])
@pytest.mark.parametrize(
    "params", [SamplingParams(), SamplingParams(0.7), SamplingParams(1, 40), SamplingParams(1, 0, 0.95)]
)
def test_no_token_of_probability_zero_is_proposed_at_either_end(uniform: float, params: SamplingParams) -> None:
    # Forbidden tokens at both ends and in the middle of a vocabulary long enough for the rounding of its sum to matter.
    logits = random_logits(16, 4096, seed=2)
    forbidden = torch.zeros(4096, dtype=torch.bool)
    forbidden[[0, 1, 2000, 4094, 4095]] = True
    logits[:, 3000:3500] = -200  # allowed, but its probability underflows to 0
    proposal = propose(logits, torch.full((16,), uniform), params, forbidden, WHOLE)
    assert not forbidden[proposal.token_ids].any()
    assert (proposal.confidence > 0).all()
    only_one = torch.ones(4096, dtype=torch.bool)
    only_one[77] = False
    assert (propose(logits, torch.full((16,), uniform), params, only_one, WHOLE).token_ids == 77).all()


def test_forbidden_tokens_count_in_no_probability() -> None:
    logits, forbidden = random_logits(5, 9), NOTHING.clone()
    forbidden[[0, 4]] = True
    louder = logits.clone()
    louder[:, [0, 4]] = 1000.0
    uniform = grid_of(5)
    for params in PARAMS:
        quiet, loud = (propose(x, uniform, params, forbidden, WHOLE) for x in (logits, louder))
        assert_same(quiet, loud)
    raw = propose(logits, uniform, SamplingParams(0.0), forbidden, WHOLE)
    expected = logits[:, ~forbidden].softmax(-1).amax(-1)
    torch.testing.assert_close(raw.confidence, expected)


def test_confidence_ignores_temperature_and_filters() -> None:
    logits = random_logits(200, 9, seed=5)
    p_raw = logits.softmax(-1)
    for params in PARAMS:
        proposal = propose(logits, grid_of(200), params, NOTHING, WHOLE)
        expected = p_raw.gather(1, proposal.token_ids[:, None])[:, 0]
        torch.testing.assert_close(proposal.confidence, expected)
    assert (propose(logits, grid_of(200), SamplingParams(0.0), NOTHING, WHOLE).confidence < 1).all()


def test_temperature_zero_takes_the_most_likely_token_and_the_lowest_of_ties() -> None:
    logits = torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [1.0, 0.0, 5.0, 5.0]])
    forbidden = torch.tensor([True, False, False, False])
    proposal = propose(logits, grid_of(3), SamplingParams(0.0), forbidden, WHOLE)
    assert proposal.token_ids.tolist() == [1, 1, 2]
    assert proposal.entropy.tolist() == [0.0, 0.0, 0.0]


def test_a_tiny_temperature_is_greedy_and_does_not_overflow() -> None:
    logits = random_logits(50, 9)
    proposal = propose(logits, grid_of(50), SamplingParams(1e-38), NOTHING, WHOLE)
    assert torch.equal(proposal.token_ids, logits.argmax(-1))
    assert proposal.entropy.isfinite().all()


def test_top_p_keeps_the_smallest_set_that_reaches_the_mass() -> None:
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    nothing = NOTHING[:4]
    for top_p, kept in ((1e-9, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.76, 3), (0.875, 3), (0.88, 4), (1.0, 4)):
        shares = token_shares(logits, SamplingParams(top_p=top_p), nothing)
        assert (shares > 0).tolist() == [i < kept for i in range(4)], top_p


def test_one_position_does_not_depend_on_the_others_nor_on_the_shape() -> None:
    logits, uniform = random_logits(6, 4, 9), torch.rand(6, 4, generator=torch.Generator().manual_seed(3))
    for params in PARAMS[::5]:
        together = propose(logits, uniform, params, NOTHING, WHOLE)
        assert together.token_ids.shape == together.confidence.shape == together.entropy.shape == (6, 4)
        flat = propose(logits.flatten(0, 1), uniform.flatten(), params, NOTHING, WHOLE)
        assert torch.equal(together.token_ids.flatten(), flat.token_ids)
        one = propose(logits[2, 3], uniform[2, 3], params, NOTHING, WHOLE)
        assert_same(one, Proposal(together.token_ids[2, 3], together.confidence[2, 3], together.entropy[2, 3]))
    empty = propose(logits[:0], uniform[:0], SamplingParams(), NOTHING, WHOLE)
    assert empty.token_ids.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_was_used_before_changes_nothing(dtype: torch.dtype) -> None:
    memory = WorkingMemory()
    for num, params in itertools.product((20, 7, 30), PARAMS[::5]):
        logits = random_logits(num, 9, seed=num).to(dtype)
        before, fresh = logits.clone(), propose(logits, grid_of(num), params, NOTHING, WHOLE)
        assert_same(propose(logits, grid_of(num), params, NOTHING, WHOLE, memory), fresh)
        assert torch.equal(logits, before)


def test_half_precision_logits_are_read_in_full_precision() -> None:
    logits = random_logits(30, 9).bfloat16()
    proposal = propose(logits, grid_of(30), SamplingParams(), NOTHING, WHOLE)
    assert_same(proposal, propose(logits.float(), grid_of(30), SamplingParams(), NOTHING, WHOLE))
    assert proposal.confidence.dtype == proposal.entropy.dtype == torch.float32


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(0.0), SamplingParams(0.5, 3, 0.9)], ids=str)
def test_broken_logits_are_reported_and_propose_the_lowest_allowed_token(params: SamplingParams) -> None:
    logits = random_logits(5, 9)
    logits[0, 3], logits[1, :], logits[2, 5], logits[3, :] = math.nan, math.nan, math.inf, -math.inf
    forbidden = NOTHING.clone()
    forbidden[0] = True
    proposal = propose(logits, grid_of(5), params, forbidden, WHOLE)
    assert proposal.token_ids[:4].tolist() == [1, 1, 1, 1]
    assert proposal.confidence.isnan().tolist() == proposal.entropy.isnan().tolist() == [True] * 4 + [False]
    healthy = propose(logits[4:], grid_of(5)[4:], params, forbidden, WHOLE)
    assert proposal.token_ids[4] == healthy.token_ids[0]


class RecordedOperators(TorchDispatchMode):
    """Names of the operators that run inside the context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_the_vocabulary_is_never_sorted_and_the_host_reads_nothing(params: SamplingParams) -> None:
    with RecordedOperators() as recorded:
        propose(random_logits(4, 9), grid_of(4), params, NOTHING, WHOLE)
    assert "sort" not in recorded.names
    assert ("topk" in recorded.names) == (params.top_k > 0 and params.temperature > 0)
    assert not recorded.names & {"_local_scalar_dense", "nonzero", "item"}


@pytest.mark.parametrize(
    ("key", "value"), [("temperature", -0.1), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.1), ("temperature", math.nan)]
)
def test_parameters_outside_their_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key}="):
        SamplingParams(**{key: value})  # type: ignore[arg-type]


def assert_same(actual: Proposal, expected: Proposal) -> None:
    assert torch.equal(actual.token_ids, expected.token_ids)
    torch.testing.assert_close(actual.confidence, expected.confidence)
    torch.testing.assert_close(actual.entropy, expected.entropy, atol=1e-6, rtol=1e-5)
