"""Figures of decoded text, against loops one can read."""

from dataclasses import replace

import pytest
import torch

from nemo_opdlm.diffusion.layout import clean_rows
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.evaluation.decoding import judge, repeated_ngrams, responses
from nemo_opdlm.megatron.forward import MicroBatch, forward_only
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.trajectories import random_trajectory


def loop_of_repeats(trajectory: Trajectory, length: int) -> float:
    repeated = total = 0
    for row in range(len(trajectory)):
        seen = set()
        start, size = int(trajectory.prompt_len[row]), int(trajectory.response_len[row])
        tokens = trajectory.token_ids[row, start : start + size].tolist()
        for first in range(size - length + 1):
            gram = tuple(tokens[first : first + length])
            repeated += gram in seen
            total += 1
            seen.add(gram)
    return repeated / total if total else 0.0


def test_responses_are_the_real_response_tokens() -> None:
    trajectory = random_trajectory(9, 4)
    for row, response in enumerate(responses(trajectory)):
        start, size = int(trajectory.prompt_len[row]), int(trajectory.response_len[row])
        assert response.tolist() == trajectory.token_ids[row, start : start + size].tolist()


@pytest.mark.parametrize("length", [1, 2, 4])
def test_repeats_are_those_of_the_loop(length: int) -> None:
    trajectory = random_trajectory(12, 4)
    # Three kinds of tokens only, so that there are repeats.
    trajectory = replace(trajectory, token_ids=trajectory.token_ids % 3)
    share = repeated_ngrams(trajectory, length)
    assert share == pytest.approx(loop_of_repeats(trajectory, length)) and share > 0


def test_one_token_over_and_over_repeats_everything_but_the_first() -> None:
    trajectory = random_trajectory(3, 4)
    same = replace(trajectory, token_ids=torch.zeros_like(trajectory.token_ids))
    total = sum(max(0, size - 3) for size in trajectory.response_len.tolist())
    with_any = sum(size > 3 for size in trajectory.response_len.tolist())
    assert repeated_ngrams(same, 4) == pytest.approx((total - with_any) / total)


def test_responses_shorter_than_the_window_repeat_nothing() -> None:
    assert repeated_ngrams(random_trajectory(4, 4), 1000) == 0.0


@pytest.mark.parametrize(("autocast_dtype", "tolerance"), [(None, 1e-5), (torch.bfloat16, 3e-2)])
def test_the_teachers_verdict_is_that_of_one_row_at_a_time(
    autocast_dtype: torch.dtype | None, tolerance: float
) -> None:
    options = ModelOptions(initialize=False, autocast_dtype=autocast_dtype)
    teacher = Teacher(tiny.architecture(), initialize(), options, micro_batch_size=2)
    network = tiny.random_network(tiny.architecture(), initialize())
    teacher.network.load_state_dict(network.state_dict())
    trajectory = random_trajectory(5, 4)
    loglik, agreements = [], []
    for row in range(len(trajectory)):
        single = trajectory.index(slice(row, row + 1))
        hidden = forward_only(teacher.network, [MicroBatch(*clean_rows(single))], lambda hidden, _: hidden)[0][0]
        log_probs = teacher.head.logits(hidden).log_softmax(-1)
        start = int(single.prompt_len)
        for position in range(start, start + int(single.response_len)):
            token = int(single.token_ids[0, position])
            loglik.append(float(log_probs[position - 1, token]))
            agreements.append(int(log_probs[position - 1].argmax()) == token)
    report = judge(teacher, trajectory)
    assert report.teacher_loglik == pytest.approx(sum(loglik) / len(loglik), abs=tolerance)
    # bf16 may decide between two equally likely tokens the other way.
    assert report.teacher_agreement == pytest.approx(sum(agreements) / len(agreements), abs=10 * tolerance)
    assert report.response_len == pytest.approx(len(loglik) / 5)
    assert report.tokens_per_forward == pytest.approx(len(loglik) / sum(trajectory.num_forwards.tolist()))
    assert report.repeat_4gram == repeated_ngrams(trajectory, 4)
