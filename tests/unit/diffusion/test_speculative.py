"""Drafting changes how many forwards a response takes, and nothing else: the text is that of causal decoding."""

import itertools
from dataclasses import replace

import pytest
import torch

from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.sampler import rollout, run
from nemo_opdlm.diffusion.settings import RolloutProgress, RolloutSettings
from nemo_opdlm.diffusion.speculative import speculate
from nemo_opdlm.diffusion.trajectory import NEVER_UNMASKED, FinishReason, Trajectory
from nemo_opdlm.testing.fake_drafter import FakeDrafter
from nemo_opdlm.testing.trajectories import (
    END_TOKEN_ID,
    MASK_TOKEN_ID,
    VOCAB_SIZE,
    fake_denoiser,
    random_requests,
    rollout_settings,
)

GREEDY = SamplingParams(0.0)
SAMPLING = [GREEDY, SamplingParams(1.0), SamplingParams(0.7, 3), SamplingParams(1.3, 0, 0.8)]


def drafter(skill: float = 0.5, params: SamplingParams = GREEDY, end_bias: float = -1.0) -> FakeDrafter:
    bias = torch.zeros(VOCAB_SIZE)
    bias[END_TOKEN_ID] = end_bias
    return FakeDrafter(VOCAB_SIZE, 1, MASK_TOKEN_ID, params, bias=bias, skill=skill)


def causal(params: SamplingParams, requests: Requests, settings: RolloutSettings) -> Trajectory:
    """The same network token by token, through the sampler of block diffusion in blocks of one."""
    one_by_one = replace(settings, block_size=1, denoising_steps=1)
    return rollout(fake_denoiser(1, params=params), requests, one_by_one).with_block_size(settings.block_size)


def speculated(
    network: FakeDrafter,
    requests: Requests,
    settings: RolloutSettings,
    num_slots: int | None = None,
    late_reads: bool = False,
) -> Trajectory:
    return run(network, speculate(requests, settings, num_slots=num_slots, late_reads=late_reads))


def assert_same_text(found: Trajectory, expected: Trajectory) -> None:
    for name in ("token_ids", "confidence", "prompt_len", "response_len", "finish_reason", "sample_ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert found.block_size == expected.block_size


@pytest.mark.parametrize("params", SAMPLING, ids=str)
@pytest.mark.parametrize(
    ("block_size", "skill"), [(1, 0.5), (2, 0.5), (3, 0.9), (4, 0.0), (4, 0.6), (4, 1.0), (8, 0.8)]
)
def test_the_text_is_that_of_causal_decoding(block_size: int, skill: float, params: SamplingParams) -> None:
    # P runs over every remainder modulo b, P = 1 among them; responses end by themselves, at limits, inside drafts.
    requests, settings = random_requests(24, block_size), rollout_settings(block_size)
    expected = causal(params, requests, settings)
    assert_same_text(speculated(drafter(skill, params), requests, settings), expected)
    assert set(expected.finish_reason.tolist()) == {FinishReason.END_OF_TURN, FinishReason.LENGTH}


@pytest.mark.parametrize(("block_size", "skill"), [(2, 0.5), (3, 0.8), (4, 0.7), (8, 0.9)])
def test_forwards_are_those_of_the_slow_loop(block_size: int, skill: float) -> None:
    requests, network = random_requests(24, block_size), drafter(skill)
    trajectory = speculated(network, requests, rollout_settings(block_size))
    for row in range(24):
        start, length = int(trajectory.prompt_len[row]), int(trajectory.response_len[row])
        limit = int(requests.max_new_tokens[row])
        text = trajectory.token_ids[row].tolist()
        num_written = num_drafts = 0
        expected = []
        while num_written < length:
            num_accepted = 0
            while num_accepted < num_drafts and network.drafts_rightly(text[: start + num_written + num_accepted]):
                num_accepted += 1
            all_agree = num_accepted == num_drafts
            num_written += num_accepted + 1
            num_drafts = max(0, min(block_size - 1, limit - 1 - num_written)) if all_agree else 0
            expected.append(min(num_written, length))
        ends = [int((trajectory.unmask_step[row, start:] <= n).sum()) for n in range(1, len(expected) + 1)]
        assert trajectory.num_forwards[row] == len(expected) and ends == expected


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_right_drafts_give_a_block_per_forward_and_wrong_ones_cost_none(block_size: int) -> None:
    requests, settings = random_requests(24, block_size), rollout_settings(block_size)
    best, worst, between = (speculated(drafter(skill), requests, settings) for skill in (1.0, 0.0, 0.5))
    assert torch.equal(best.num_forwards, 1 + -(-(best.response_len - 1) // block_size))
    assert torch.equal(worst.num_forwards, worst.response_len)
    assert (between.num_forwards <= worst.num_forwards).all() and (between.num_forwards >= best.num_forwards).all()
    if block_size > 1:
        assert best.num_forwards.sum() < between.num_forwards.sum() < worst.num_forwards.sum()


def test_every_forward_writes_the_tokens_after_those_of_the_last() -> None:
    network, settings = drafter(0.7), rollout_settings(4)
    trajectory = speculated(network, random_requests(24, 4), settings)
    for row in range(24):
        start, length = int(trajectory.prompt_len[row]), int(trajectory.response_len[row])
        when = trajectory.unmask_step[row].tolist()
        assert when[:start] == [0] * start and set(when[start + length :]) <= {NEVER_UNMASKED}
        written = when[start : start + length]
        assert written == sorted(written) and set(written) == set(range(1, int(trajectory.num_forwards[row]) + 1))
    assert sum(len(call.rows) for call in network.forwards) == int(trajectory.num_forwards.sum())


def test_drafts_end_where_the_limit_makes_them_useless() -> None:
    requests = random_requests(12, 4)
    network = drafter(1.0, end_bias=-100.0)
    speculated(network, requests, rollout_settings(4))
    limit_end = (requests.prompt_len + requests.max_new_tokens)[:, None]
    for call in network.forwards:
        beyond = call.position_ids >= limit_end[call.rows] - 1
        assert not (call.valid & beyond).any(), "the last token is proposed by the one before it"


@pytest.mark.parametrize("num_slots", [1, 2, 5, 40])
def test_rows_that_wait_for_a_slot_are_written_as_if_all_had_one(num_slots: int) -> None:
    requests, settings = random_requests(24, 4), rollout_settings(4)
    expected = speculated(drafter(params=SamplingParams()), requests, settings)
    network = drafter(params=SamplingParams())
    found = speculated(network, requests, settings, num_slots)
    assert_same_text(found, expected)
    assert torch.equal(found.num_forwards, expected.num_forwards) and torch.equal(
        found.unmask_step, expected.unmask_step
    )
    assert max(len(call.rows) for call in network.forwards) == min(num_slots, 24)


@pytest.mark.parametrize("num_slots", [1, 5, 40])
def test_a_host_that_hears_late_writes_the_same(num_slots: int) -> None:
    network, settings, requests = drafter(), rollout_settings(4), random_requests(24, 4)
    expected = speculated(drafter(), requests, settings)
    found = speculated(network, requests, settings, num_slots, late_reads=True)
    for name in ("token_ids", "unmask_step", "confidence", "response_len", "finish_reason", "num_forwards"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert {call.token_ids.shape[1] for call in network.forwards} == {8}


def test_a_row_does_not_depend_on_its_batch_nor_on_the_order() -> None:
    settings, requests = rollout_settings(4), replace(random_requests(12, 4), sample_ids=torch.arange(12) * 7)
    params = SamplingParams()
    together = run(drafter(params=params), speculate(requests, settings))
    for rows in (torch.tensor([5]), torch.tensor([11, 0, 3]), torch.tensor([4, 4])):
        part = run(drafter(params=params), speculate(requests.index(rows), settings))
        width = part.token_ids.shape[1]
        assert torch.equal(part.token_ids, together.token_ids[rows, :width])
        assert torch.equal(part.num_forwards, together.num_forwards[rows])


@pytest.mark.parametrize("prompt_len", range(1, 10))
def test_an_immediate_end_token_is_a_response_of_one(prompt_len: int) -> None:
    requests = Requests(torch.ones(1, 9).long(), torch.tensor([prompt_len]), torch.tensor([30]), torch.tensor([0]))
    trajectory = speculated(drafter(1.0, end_bias=100.0), requests, rollout_settings(4))
    assert trajectory.response_len.tolist() == trajectory.num_forwards.tolist() == [1]
    assert trajectory.finish_reason.tolist() == [FinishReason.END_OF_TURN]


class ScriptedDrafter(FakeDrafter):
    """Writes a given token at each absolute position, whatever stands before it."""

    def __init__(self, script: list[int]) -> None:
        super().__init__(VOCAB_SIZE, 1, MASK_TOKEN_ID, GREEDY, skill=1.0)
        self.script = script

    def _block_logits(self, link: int, block: list[int], start: int) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.tensor([self.script[start]]), VOCAB_SIZE) * 30.0


@pytest.mark.parametrize(("place", "limit"), itertools.product(range(10), (5, 8, 10)))
def test_the_first_end_token_cuts_the_response_wherever_it_stands_in_a_draft(place: int, limit: int) -> None:
    script = [1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6]
    script[2 + place] = script[3 + place] = END_TOKEN_ID
    prompt_ids = torch.tensor([[END_TOKEN_ID, 1]])
    requests = Requests(prompt_ids, torch.tensor([2]), torch.tensor([limit]), torch.tensor([0]))
    trajectory = speculated(ScriptedDrafter(script), requests, rollout_settings(4))
    length = min(place + 1, limit)
    assert trajectory.response_len.tolist() == [length]
    assert trajectory.num_forwards.tolist() == [1 + -(-(length - 1) // 4)]
    assert trajectory.is_end_token.sum() == int(place < limit)
    assert (
        trajectory.token_ids[0, 2:].tolist() == (script[2 : 2 + length] + 4 * [0])[: trajectory.token_ids.shape[1] - 2]
    )


@pytest.mark.parametrize("token", [MASK_TOKEN_ID, END_TOKEN_ID])
def test_the_token_that_a_response_starts_from_may_be_any(token: int) -> None:
    requests = Requests(torch.tensor([[token]]), torch.tensor([1]), torch.tensor([9]), torch.tensor([0]))
    trajectory = speculated(drafter(1.0, end_bias=-100.0), requests, rollout_settings(4))
    assert trajectory.token_ids[0, 0] == token
    assert trajectory.response_len.tolist() == [9] and trajectory.num_forwards.tolist() == [3]


def test_a_network_with_broken_logits_finishes_and_its_record_shows_it() -> None:
    network, requests, settings = drafter(), random_requests(4, 4), rollout_settings(4)
    network.bias = torch.full((VOCAB_SIZE,), torch.nan)
    trajectory = speculated(network, requests, settings)
    assert torch.equal(trajectory.response_len, requests.max_new_tokens)
    assert trajectory.confidence[trajectory.is_response].isnan().all()


def test_progress_counts_forwards_open_rows_and_written_tokens() -> None:
    reports: list[RolloutProgress] = []
    requests, network = random_requests(6, 4), drafter(1.0)
    trajectory = run(network, speculate(requests, rollout_settings(4), reports.append, 2))
    assert [report["num_forwards"] for report in reports] == list(range(len(network.forwards) + 1))
    assert (reports[0]["num_active"], reports[-1]["num_active"]) == (6, 0)
    tokens = [report["num_tokens"] for report in reports]
    assert tokens[0] == 0 and tokens == sorted(tokens) and tokens[-1] == int(trajectory.response_len.sum())
