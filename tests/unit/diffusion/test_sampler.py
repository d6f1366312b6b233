"""The rollout: equal to the slow loop, blind to its batch, frugal with forwards, and never over what is committed."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from nemo_opdlm.diffusion.canvas import Status
from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingStrategy
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.sampler import rollout
from nemo_opdlm.diffusion.settings import RolloutProgress, RolloutSettings
from nemo_opdlm.diffusion.trajectory import NEVER_UNMASKED, FinishReason, Trajectory
from nemo_opdlm.testing.fake_denoiser import FakeDenoiser
from nemo_opdlm.testing.oracles import oracle_quota, oracle_rollout
from nemo_opdlm.testing.trajectories import (
    END_TOKEN_ID,
    MASK_TOKEN_ID,
    fake_denoiser,
    random_requests,
    rollout_settings,
)

STRATEGIES = list(RemaskingStrategy)
STATIC, DYNAMIC = RemaskingStrategy.LOW_CONFIDENCE_STATIC, RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC
BLOCKS_AND_STEPS = [(1, 1), (2, 5), (3, 2), (4, 1), (4, 3), (4, 4), (8, 3)]


def run(
    settings: RolloutSettings,
    num_rows: int = 12,
    end_bias: float = -1.0,
    params: SamplingParams | None = None,
    num_slots: int | None = None,
    late_reads: bool = False,
) -> tuple[Trajectory, FakeDenoiser]:
    denoiser = fake_denoiser(settings.block_size, end_bias, params)
    requests = random_requests(num_rows, settings.block_size)
    return rollout(denoiser, requests, settings, num_slots=num_slots, late_reads=late_reads), denoiser


def assert_rows_equal(actual: Trajectory, expected: Trajectory) -> None:
    width = min(actual.token_ids.shape[1], expected.token_ids.shape[1])
    for name in ("token_ids", "unmask_step", "confidence"):
        assert torch.equal(getattr(actual, name)[:, :width], getattr(expected, name)[:, :width]), name
    for name in ("prompt_len", "response_len", "finish_reason", "num_forwards", "sample_ids"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("block_size", "steps"), BLOCKS_AND_STEPS)
def test_equals_the_slow_loop_without_a_cache(block_size: int, steps: int, strategy: RemaskingStrategy) -> None:
    # P runs over every remainder modulo b, p = 0 among them; the limits end inside blocks and at their ends.
    settings = rollout_settings(block_size, strategy, steps)
    trajectory, denoiser = run(settings)
    requests = random_requests(12, block_size)
    for row in range(12):
        prompt = requests.prompt_ids[row, : requests.prompt_len[row]].tolist()
        expected = oracle_rollout(denoiser, prompt, int(requests.max_new_tokens[row]), row, settings)
        end = len(expected.token_ids)
        assert trajectory.token_ids[row].tolist()[:end] == expected.token_ids
        assert trajectory.unmask_step[row].tolist()[:end] == expected.unmask_step
        assert trajectory.confidence[row].tolist()[:end] == pytest.approx(expected.confidence, rel=1e-5)
        assert trajectory.response_len[row] == expected.response_len
        assert trajectory.finish_reason[row] == expected.finish_reason
        assert trajectory.num_forwards[row] == expected.num_forwards
        assert trajectory.row_end[row] == end and (trajectory.unmask_step[row, end:] == NEVER_UNMASKED).all()
        assert not trajectory.token_ids[row, end:].any(), "no masks are left behind as padding"


@pytest.mark.parametrize(
    "params", [SamplingParams(0.0), SamplingParams(0.5), SamplingParams(1.0, 3), SamplingParams(1.3, 0, 0.8)], ids=str
)
def test_equals_the_slow_loop_under_temperature_and_filters(params: SamplingParams) -> None:
    settings = rollout_settings(4)
    trajectory, denoiser = run(settings, params=params)
    requests = random_requests(12, 4)
    for row in range(12):
        prompt = requests.prompt_ids[row, : requests.prompt_len[row]].tolist()
        expected = oracle_rollout(denoiser, prompt, int(requests.max_new_tokens[row]), row, settings)
        assert trajectory.token_ids[row].tolist()[: len(expected.token_ids)] == expected.token_ids


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("block_size", "steps"), BLOCKS_AND_STEPS)
def test_every_token_of_a_row_is_unmasked_exactly_once_and_then_stays(
    block_size: int, steps: int, strategy: RemaskingStrategy
) -> None:
    trajectory, denoiser = run(rollout_settings(block_size, strategy, steps))
    for row in range(len(trajectory)):
        prompt_len, end = int(trajectory.prompt_len[row]), int(trajectory.row_end[row])
        final, when = trajectory.token_ids[row].tolist(), trajectory.unmask_step[row].tolist()
        assert when[:prompt_len] == [0] * prompt_len
        assert all(1 <= step <= trajectory.num_forwards[row] for step in when[prompt_len:end])
        for forward, (start, block) in enumerate(denoiser.visited_states(row), start=1):
            for position, token in enumerate(block, start):
                # What a forward saw is what was revealed before it: nothing is written twice or taken back.
                assert token == (MASK_TOKEN_ID if when[position] >= forward else final[position])


@pytest.mark.parametrize("block_size", range(1, 65))
def test_any_block_size_and_number_of_steps_unmasks_by_its_strategy(block_size: int) -> None:
    """What the record alone can tell; the slow loop is compared with for smaller blocks."""
    numbers_of_steps = [1, block_size, -(-block_size // 2), -(-block_size // 3), max(block_size - 1, 1)]
    for number, strategy in enumerate(STRATEGIES):
        steps = numbers_of_steps[(number + block_size) % len(numbers_of_steps)]
        settings = rollout_settings(block_size, strategy, steps, threshold=0.4)
        prompt_len = torch.tensor([1, block_size, block_size + block_size // 2 + 1])
        prompt_ids = torch.arange(3 * 2 * block_size).reshape(3, -1) % END_TOKEN_ID
        limits = torch.tensor([block_size + 1, block_size, 1])
        denoiser = fake_denoiser(block_size)
        requests = Requests(prompt_ids, prompt_len, limits, torch.arange(3))
        trajectory = rollout(denoiser, requests, settings, num_slots=2)
        for row in range(3):
            start, end = int(prompt_len[row]), int(trajectory.row_end[row])
            assert trajectory.token_ids[row, :start].tolist() == prompt_ids[row, :start].tolist()
            assert trajectory.unmask_step[row, :start].tolist() == [0] * start
            assert MASK_TOKEN_ID not in trajectory.token_ids[row, start:end].tolist()
            assert_unmasked_by_its_strategy(trajectory, row, settings)


def assert_unmasked_by_its_strategy(trajectory: Trajectory, row: int, settings: RolloutSettings) -> None:
    size, strategy = settings.block_size, settings.remasking.strategy
    when, confidence = trajectory.unmask_step[row].tolist(), trajectory.confidence[row].tolist()
    start, num_forwards = int(trajectory.prompt_len[row]), 0
    for block in range(start - start % size, int(trajectory.row_end[row]), size):
        places = range(max(block, start), block + size)
        for quota in oracle_quota(size, settings.denoising_steps):
            masked = [i for i in places if when[i] > num_forwards]
            if not masked:
                break
            num_forwards += 1
            revealed = [i for i in masked if when[i] == num_forwards]
            least = min(max(quota, 1), len(masked))
            if strategy == DYNAMIC:
                sure = [i for i in revealed if confidence[i] > settings.remasking.threshold]
                assert len(revealed) == max(len(sure), least)
            elif strategy == RemaskingStrategy.ENTROPY_BOUNDED:
                assert len(revealed) >= least
            else:
                assert len(revealed) == least
            if strategy == RemaskingStrategy.SEQUENTIAL:
                assert revealed == masked[:least]
        assert all(when[i] <= num_forwards for i in places), "a token was revealed after its block's last step"
    assert num_forwards == trajectory.num_forwards[row]


@pytest.mark.parametrize("token", [MASK_TOKEN_ID, END_TOKEN_ID])
def test_prompt_tokens_in_the_first_block_are_kept_whatever_they_are(token: int) -> None:
    one = torch.tensor([1])
    requests = Requests(torch.full((1, 3), token), one * 3, one, one)
    trajectory = rollout(fake_denoiser(4), requests, rollout_settings(4))
    assert trajectory.token_ids[0, :3].tolist() == [token] * 3
    assert trajectory.unmask_step.tolist() == [[0, 0, 0, 1]] and trajectory.response_len.tolist() == [1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_mask_and_forbidden_tokens_are_never_written(strategy: RemaskingStrategy) -> None:
    loud = torch.zeros(13)
    loud[[MASK_TOKEN_ID, 0, 5]] = 50.0
    denoiser = FakeDenoiser(13, 4, MASK_TOKEN_ID, forbidden=(0, 5), bias=loud)
    trajectory = rollout(denoiser, random_requests(12, 4), rollout_settings(4, strategy, 3))
    written = trajectory.token_ids[trajectory.confidence > 0]
    assert written.numel() > 50
    assert not torch.isin(written, torch.tensor([MASK_TOKEN_ID, 0, 5])).any()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("block_size", "steps"), BLOCKS_AND_STEPS)
def test_threshold_one_reproduces_static(block_size: int, steps: int, temperature: float) -> None:
    params = SamplingParams(temperature)
    static, _ = run(rollout_settings(block_size, STATIC, steps), params=params)
    dynamic, _ = run(rollout_settings(block_size, DYNAMIC, steps, threshold=1.0), params=params)
    assert_rows_equal(dynamic, static)


@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_threshold_zero_unmasks_a_block_in_one_step(block_size: int) -> None:
    trajectory, _ = run(rollout_settings(block_size, DYNAMIC, threshold=0.0))
    first_block = trajectory.prompt_len // block_size
    num_blocks = trajectory.row_end // block_size - first_block
    assert torch.equal(trajectory.num_forwards, num_blocks)
    blocks = torch.arange(trajectory.token_ids.shape[1]) // block_size
    expected = (blocks - first_block[:, None] + 1).int()
    assert torch.equal(trajectory.unmask_step[trajectory.is_response], expected[trajectory.is_response])


def test_static_spends_one_forward_per_token_and_none_on_the_cache() -> None:
    trajectory, denoiser = run(rollout_settings(4, STATIC))
    decoded = trajectory.row_end - trajectory.prompt_len
    assert torch.equal(trajectory.num_forwards, decoded)
    assert len(denoiser.forwards) == int(trajectory.num_forwards.max())
    assert sum(call.rows.numel() for call in denoiser.forwards) == int(trajectory.num_forwards.sum())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("block_size", [1, 2, 3, 4])
def test_blocks_are_committed_once_by_the_first_forward_of_the_next_and_the_last_never(
    block_size: int, strategy: RemaskingStrategy
) -> None:
    # The fake network refuses gaps and repeats; what is left to see is that nothing is committed early or at the end.
    trajectory, denoiser = run(rollout_settings(block_size, strategy))
    committed = [len(denoiser.chains.get(row, [])) for row in range(len(trajectory))]
    assert committed == (trajectory.row_end // block_size - 1).tolist()
    assert len(denoiser.prefills) <= 1
    whole_blocks = trajectory.prompt_len // block_size
    for call in denoiser.prefills:
        assert torch.equal(call.valid.sum(1), (whole_blocks[call.rows] - 1) * block_size)
    for call in denoiser.forwards:
        width = call.token_ids.shape[1]
        has_pending = call.valid[:, 0] if width == 2 * block_size else torch.zeros_like(call.rows, dtype=torch.bool)
        assert width == (2 * block_size if has_pending.any() else block_size)
        is_first = (call.token_ids[:, -block_size:] == MASK_TOKEN_ID).all(1)
        # A block's first forward shows masks only, but for prompt tokens at the head of the first block.
        assert torch.equal(is_first & (call.position_ids[:, -block_size] > 0), has_pending & is_first)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_row_does_not_depend_on_its_batch_nor_on_the_order(strategy: RemaskingStrategy) -> None:
    settings = rollout_settings(4, strategy, 3)
    requests = replace(random_requests(12, 4), sample_ids=torch.arange(12) * 7)
    together = rollout(fake_denoiser(4), requests, settings)
    shuffled = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    for rows in (torch.tensor([5]), torch.tensor([11, 0, 3]), shuffled, torch.tensor([4, 4])):
        part = rollout(fake_denoiser(4), requests.index(rows), settings)
        assert_rows_equal(part, together.index(rows))


def test_rows_are_asked_in_rising_order_and_finished_rows_leave() -> None:
    trajectory, denoiser = run(rollout_settings(4, STATIC))
    for forward, call in enumerate(denoiser.forwards, start=1):
        assert call.rows.tolist() == (trajectory.num_forwards >= forward).nonzero()[:, 0].tolist()


def test_seed_and_step_change_the_draw() -> None:
    base, _ = run(rollout_settings(4))
    again, _ = run(rollout_settings(4))
    assert_rows_equal(again, base)
    for settings in (rollout_settings(4, seed=1), rollout_settings(4, step=2)):
        other, _ = run(settings)
        assert not torch.equal(other.num_forwards, base.num_forwards)


def test_copies_of_a_prompt_differ_by_their_sample() -> None:
    ones = torch.ones(20, dtype=torch.int64)
    denoiser = fake_denoiser(4, end_bias=-100.0)
    requests = Requests(ones[:, None], ones, 20 * ones, torch.arange(20))
    trajectory = rollout(denoiser, requests, rollout_settings(4))
    assert len({tuple(row) for row in trajectory.token_ids.tolist()}) == 20


@pytest.mark.parametrize("prompt_len", range(1, 10))
def test_an_immediate_end_token_is_a_response_of_one(prompt_len: int) -> None:
    denoiser = fake_denoiser(4, end_bias=100.0)
    requests = Requests(torch.ones(1, 9).long(), torch.tensor([prompt_len]), torch.tensor([30]), torch.tensor([0]))
    trajectory = rollout(denoiser, requests, rollout_settings(4, STATIC))
    assert trajectory.response_len.tolist() == [1]
    assert trajectory.finish_reason.tolist() == [FinishReason.END_OF_TURN]
    assert trajectory.token_ids[trajectory.is_response].tolist() == [END_TOKEN_ID]
    # The block is denoised to its end and handed over whole.
    rest = trajectory.unmask_step[0, prompt_len : int(trajectory.row_end[0])]
    assert sorted(rest.tolist()) == list(range(1, 4 - prompt_len % 4 + 1))


@pytest.mark.parametrize(("prompt_len", "limit"), itertools.product((1, 4, 6), (1, 2, 3, 5, 8)))
def test_the_limit_cuts_inside_a_block_without_an_end_token(prompt_len: int, limit: int) -> None:
    denoiser = fake_denoiser(4, end_bias=-100.0)
    requests = Requests(torch.ones(1, 6).long(), torch.tensor([prompt_len]), torch.tensor([limit]), torch.tensor([0]))
    trajectory = rollout(denoiser, requests, rollout_settings(4))
    assert trajectory.response_len.tolist() == [limit]
    assert trajectory.finish_reason.tolist() == [FinishReason.LENGTH]
    assert trajectory.token_ids.shape[1] == -(-(prompt_len + limit) // 4) * 4
    assert not (trajectory.unmask_step == NEVER_UNMASKED).any()
    assert not (trajectory.token_ids == END_TOKEN_ID).any()


class ScriptedDenoiser(FakeDenoiser):
    """Proposes a given token at each absolute position, surer at lower positions."""

    def __init__(self, script: list[int]) -> None:
        super().__init__(13, 4, MASK_TOKEN_ID)
        self.script = script

    def _block_logits(self, link: int, block: list[int], start: int) -> torch.Tensor:
        logits = torch.zeros(4, 13)
        for i in range(4):
            logits[i, self.script[start + i]] = 30.0 - start - i
        return logits


@pytest.mark.parametrize(
    ("script", "limit", "response_len", "reason"),
    [
        ([1, 1, 11, 2, 11, 3, 4, 5], 20, 1, FinishReason.END_OF_TURN),  # at P, another one later
        ([1, 1, 2, 11, 11, 3, 4, 5], 20, 2, FinishReason.END_OF_TURN),
        ([1, 1, 2, 3, 4, 11, 6, 11], 20, 4, FinishReason.END_OF_TURN),
        ([1, 1, 2, 3, 4, 11, 6, 11], 4, 4, FinishReason.END_OF_TURN),  # the last token allowed ends the turn
        ([1, 1, 2, 3, 4, 11, 6, 11], 3, 3, FinishReason.LENGTH),  # an end token past the limit does not count
        ([11, 11, 2, 3, 4, 5, 6, 7], 6, 6, FinishReason.LENGTH),  # end tokens of the prompt do not count
    ],
)
def test_the_first_end_token_of_the_response_cuts_it_and_the_final_block_is_kept_whole(
    script: list[int], limit: int, response_len: int, reason: FinishReason
) -> None:
    requests = Requests(torch.tensor([script[:2]]), torch.tensor([2]), torch.tensor([limit]), torch.tensor([0]))
    trajectory = rollout(ScriptedDenoiser(script), requests, rollout_settings(4, STATIC))
    assert trajectory.response_len.tolist() == [response_len] and trajectory.finish_reason.tolist() == [reason]
    end = int(trajectory.row_end[0])
    assert trajectory.token_ids[0].tolist() == script[:end]


def test_any_of_several_end_tokens_ends_and_none_is_needed() -> None:
    requests = random_requests(12, 4)
    several = replace(rollout_settings(4), end_token_ids=(END_TOKEN_ID, 3))
    trajectory = rollout(fake_denoiser(4), requests, several)
    ends = trajectory.token_ids[trajectory.is_end_token]
    assert set(ends.tolist()) == {END_TOKEN_ID, 3}
    assert torch.isin(trajectory.token_ids[trajectory.is_response], torch.tensor([END_TOKEN_ID, 3])).sum() == len(ends)
    none = rollout(fake_denoiser(4), requests, replace(several, end_token_ids=()))
    assert (none.finish_reason == FinishReason.LENGTH).all() and torch.equal(none.response_len, requests.max_new_tokens)


def test_a_network_with_broken_logits_finishes_and_its_record_shows_it() -> None:
    denoiser = fake_denoiser(4)
    denoiser.bias = torch.full((13,), torch.nan)
    trajectory = rollout(denoiser, random_requests(4, 4), rollout_settings(4))
    assert trajectory.confidence[trajectory.is_response].isnan().all()


def test_progress_is_reported_before_each_forward_and_at_the_end() -> None:
    reports: list[RolloutProgress] = []
    trajectory = rollout(fake_denoiser(4), random_requests(6, 4), rollout_settings(4), reports.append)
    num_forwards = int(trajectory.num_forwards.max())
    assert [report["num_forwards"] for report in reports] == list(range(num_forwards + 1))
    active = [int((trajectory.num_forwards > forward).sum()) for forward in range(num_forwards + 1)]
    assert [report["num_active"] for report in reports] == active
    assert all(report["num_rows"] == 6 for report in reports)
    row_forwards = [int(trajectory.num_forwards.clamp(max=forward).sum()) for forward in range(num_forwards + 1)]
    assert [report["num_row_forwards"] for report in reports] == row_forwards
    tokens = [report["num_tokens"] for report in reports]
    assert tokens[0] == 0 and tokens == sorted(tokens)
    assert tokens[-1] == int(trajectory.response_len.sum())
    assert all(type(value) is int for report in reports for value in report.values())


def test_settings_that_contradict_themselves_are_refused() -> None:
    changes: list[dict[str, Any]] = [{"block_size": 0}, {"denoising_steps": 0}, {"end_token_ids": (3, MASK_TOKEN_ID)}]
    for change in changes:
        with pytest.raises(ValueError, match="allowed"):
            replace(rollout_settings(4), **change)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_slots", [1, 2, 5, 12, 40])
def test_rows_that_wait_for_a_slot_are_written_as_if_all_had_one(num_slots: int, strategy: RemaskingStrategy) -> None:
    settings = rollout_settings(4, strategy)
    expected, _ = run(settings)
    actual, _ = run(settings, num_slots=num_slots)
    assert_rows_equal(actual, expected)


def test_the_batch_stays_full_until_the_prompts_run_out() -> None:
    """A finished row's slot works for the next prompt from the very next forward on."""
    trajectory, denoiser = run(rollout_settings(4), num_rows=30, num_slots=4)
    sizes = [len(call.rows) for call in denoiser.forwards]
    full = sizes.index(next(size for size in sizes if size < 4))
    assert sizes[:full] == [4] * full and max(sizes[full:]) < 4, "after the first empty slot no prompt was waiting"
    assert sum(sizes) == int(trajectory.num_forwards.sum())
    assert all(call.rows.tolist() == sorted(set(call.rows.tolist())) for call in denoiser.forwards)
    lock_step = [int(part.num_forwards.max()) for part in map(trajectory.index, torch.arange(30).split(4))]
    assert len(sizes) < sum(lock_step)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("num_slots", [None, 1, 5])
@pytest.mark.parametrize(("block_size", "steps"), [(1, 1), (4, 3), (8, 8)])
def test_a_host_that_hears_late_writes_the_same_in_queries_of_few_shapes(
    block_size: int, steps: int, num_slots: int | None, strategy: RemaskingStrategy
) -> None:
    settings = rollout_settings(block_size, strategy, steps)
    expected, prompt_denoiser = run(settings, num_slots=num_slots)
    actual, denoiser = run(settings, num_slots=num_slots, late_reads=True)
    assert_rows_equal(actual, expected)
    sizes = {None: {12, 6, 3, 2, 1}, 1: {1}, 5: {5, 3, 2, 1}}[num_slots]
    assert {call.rows.numel() for call in denoiser.forwards} <= sizes
    assert {call.token_ids.shape[1] for call in denoiser.forwards} == {2 * block_size}
    # One forward more for each row that a slot had to wait for.
    rounds = 12 if num_slots == 1 else 3 if num_slots else 1
    assert len(denoiser.forwards) <= len(prompt_denoiser.forwards) + 2 * rounds


def test_the_host_takes_the_answer_of_the_last_forward_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for late_reads, first_heard in ((False, 1), (True, 2)):
        heard: list[int] = []
        denoiser = fake_denoiser(4)
        read = Status.read
        with monkeypatch.context() as patch:
            patch.setattr(Status, "read", lambda status: heard.append(len(denoiser.forwards)) or read(status))  # noqa: B023
            rollout(denoiser, random_requests(6, 4), rollout_settings(4), late_reads=late_reads)
        assert heard == list(range(first_heard, len(denoiser.forwards) + 1))


def test_a_new_row_opens_with_its_own_prompt_where_an_old_one_stood() -> None:
    """Prompts are prefilled when their row gets its slot, and only if they are longer than a block."""
    settings = rollout_settings(4)
    _, denoiser = run(settings, num_slots=2)
    prompt_len = random_requests(12, 4).prompt_len
    num_prefilled = sum(len(call.rows) for call in denoiser.prefills)
    assert num_prefilled == int((prompt_len >= 8).sum()) and len(denoiser.prefills) > 1
