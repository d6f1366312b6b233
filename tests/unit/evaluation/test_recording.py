"""What is recorded of responses, against loops one can read."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_opdlm.diffusion.layout import clean_rows
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.diffusion.trajectory import FinishReason
from nemo_opdlm.evaluation import recording
from nemo_opdlm.evaluation.recording import calibration, record
from nemo_opdlm.megatron.forward import MicroBatch, forward_only
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.trajectories import random_trajectory


def test_tokens_are_recorded_with_the_teachers_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "NUM_RESPONSES", 3)
    network = tiny.random_network(tiny.architecture(), initialize(), AttentionRule.CAUSAL)
    teacher = Teacher.around(network, micro_batch_size=2)
    trajectory = random_trajectory(5, 4)
    result = record(teacher, scorer("dynamic"), trajectory)
    assert (result.mode, result.block_size, len(result.responses)) == ("dynamic", 4, 3)
    assert sum(each.num_tokens for each in result.calibration) == int(trajectory.response_len.sum())
    for row, response in enumerate(result.responses):
        single = trajectory.index(slice(row, row + 1))
        hidden = forward_only(teacher.network, [MicroBatch(*clean_rows(single))], lambda hidden, _: hidden)[0][0]
        log_probs = teacher.head.logits(hidden).log_softmax(-1)
        start, size = int(single.prompt_len), int(single.response_len)
        assert response.prompt == text(single.token_ids[0, :start].tolist())
        assert (len(response.pieces), response.num_forwards) == (size, int(single.num_forwards))
        assert response.finish_reason == FinishReason(int(single.finish_reason)).name.lower()
        for i in range(size):
            place = start + i
            token, choice = int(single.token_ids[0, place]), int(log_probs[place - 1].argmax())
            assert response.pieces[i] == text([token]) and response.first_choices[i] == text([choice])
            assert response.agrees[i] == (token == choice)
            assert response.log_probs[i] == pytest.approx(float(log_probs[place - 1, token]), abs=1e-4)
            assert response.steps[i] == int(single.unmask_step[0, place])
            assert response.confidences[i] == pytest.approx(float(single.confidence[0, place]), abs=1e-4)
            assert response.blocks[i] == place // 4 - start // 4 + 1


def test_bins_hold_the_means_of_their_tokens() -> None:
    confidence = torch.tensor([0.05, 0.31, 0.39, 1.0, 0.95, math.nan])
    agrees = torch.tensor([False, True, False, True, True, True])
    probability = torch.tensor([0.1, 0.2, 0.4, 0.8, 1.0, 0.5])
    bins = calibration(confidence, agrees, probability)
    assert [(each.low, each.high, each.num_tokens) for each in bins] == [(0.0, 0.1, 1), (0.3, 0.4, 2), (0.9, 1.0, 2)]
    assert [each.agreement for each in bins] == [0.0, 0.5, 1.0]
    assert [each.confidence for each in bins] == pytest.approx([0.05, 0.35, 0.975])
    assert [each.teacher_probability for each in bins] == pytest.approx([0.1, 0.3, 0.9])


def test_where_nothing_is_finite_there_are_no_bins() -> None:
    assert calibration(torch.tensor([math.nan]), torch.tensor([True]), torch.tensor([0.5])) == []


def text(token_ids: list[int]) -> str:
    return "".join(f"<{token_id}>" for token_id in token_ids)


def scorer(mode: str) -> Any:
    """As far as a recording asks for one."""
    tokenizer = SimpleNamespace(decode=lambda token_ids: text(token_ids.tolist()))
    generator = SimpleNamespace(tokenizer=tokenizer, pieces=lambda token_ids: [text([i]) for i in token_ids.tolist()])
    return SimpleNamespace(config=SimpleNamespace(mode=mode), generator=generator)
