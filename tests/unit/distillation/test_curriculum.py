"""The published curriculum table, and the laws of every schedule."""

import math

import pytest

from nemo_opdlm.distillation.curriculum import (
    BlockSizeSchedule,
    BlockSizeStage,
    LengthSchedule,
    Ramp,
    ThresholdSchedule,
    block_size,
    confidence_threshold,
    rollout_length,
)

STEPS = [1, 10, 25, 50, 75, 90, 100]


@pytest.mark.parametrize(
    ("ramp", "table", "mean"),
    [
        (Ramp.cos, [100, 148, 396, 1244, 2508, 3388, 4000], 1536.84),
        (Ramp.linear, [140, 488, 1076, 2048, 3024, 3608, 4000], 2069.48),
    ],
)
def test_the_published_table_is_reproduced(ramp: Ramp, table: list[int], mean: float) -> None:
    schedule = LengthSchedule(type=ramp)
    assert [rollout_length(step, schedule, 4) for step in STEPS] == table
    assert sum(rollout_length(step, schedule, 4) for step in range(1, 101)) / 100 == mean


@pytest.mark.parametrize("block", [1, 4, 7, 16])
@pytest.mark.parametrize("ramp", [Ramp.cos, Ramp.linear])
def test_lengths_are_whole_blocks_that_never_shrink(ramp: Ramp, block: int) -> None:
    lengths = [rollout_length(step, LengthSchedule(3, 200, 37, ramp), block) for step in range(1, 60)]
    assert all(length % block == 0 and length >= block for length in lengths)
    assert lengths == sorted(lengths)
    assert set(lengths[36:]) == {block * round(200 / block)}


def test_ties_go_to_the_even_multiple() -> None:
    assert [rollout_length(1, LengthSchedule(n, n), 4) for n in (1, 2, 6, 10, 14, 18)] == [4, 4, 8, 8, 16, 16]


def test_the_threshold_holds_and_then_ramps() -> None:
    schedule = ThresholdSchedule(start=0.9, end=0.7, hold_steps=150, ramp_steps=100)
    values = [confidence_threshold(step, schedule) for step in (1, 150, 200, 250, 400)]
    assert values == pytest.approx([0.9, 0.9, 0.8, 0.7, 0.7])


@pytest.mark.parametrize(
    ("ramp", "half"), [(Ramp.linear, 0.5), (Ramp.cos, 1 - math.sqrt(0.5)), (Ramp.sin, math.sqrt(0.5))]
)
def test_threshold_shapes_at_half_way(ramp: Ramp, half: float) -> None:
    schedule = ThresholdSchedule(start=0.9, end=0.7, hold_steps=0, ramp_steps=10, type=ramp)
    assert confidence_threshold(5, schedule) == pytest.approx(0.9 - 0.2 * half)


@pytest.mark.parametrize("ramp", list(Ramp))
def test_the_threshold_stays_between_its_ends(ramp: Ramp) -> None:
    schedule = ThresholdSchedule(start=0.5, end=0.95, hold_steps=3, ramp_steps=20, type=ramp)
    values = [confidence_threshold(step, schedule) for step in range(1, 40)]
    assert values == sorted(values) and values[:3] == [0.5] * 3 and values[-1] == pytest.approx(0.95)


def test_block_size_switches_at_its_step() -> None:
    schedule = BlockSizeSchedule((BlockSizeStage(1, 4), BlockSizeStage(101, 8), BlockSizeStage(151, 16)))
    assert [block_size(step, schedule) for step in (1, 100, 101, 150, 151, 999)] == [4, 4, 8, 8, 16, 16]
    assert block_size(483, BlockSizeSchedule()) == 4


@pytest.mark.parametrize("step", [0, -3])
def test_steps_count_from_one(step: int) -> None:
    for call in (
        lambda: rollout_length(step, LengthSchedule(), 4),
        lambda: confidence_threshold(step, ThresholdSchedule()),
        lambda: block_size(step, BlockSizeSchedule()),
    ):
        with pytest.raises(ValueError, match=rf"rollout_step={step} .*allowed: 1 for the first"):
            call()


@pytest.mark.parametrize(
    ("schedule", "arguments", "message"),
    [
        (LengthSchedule, {"start": 0}, r"max_new_tokens_schedule\.start=0 .*at least 1"),
        (LengthSchedule, {"start": 10, "end": 9}, r"max_new_tokens_schedule\.end=9 .*at least start=10"),
        (LengthSchedule, {"ramp_steps": 0}, r"max_new_tokens_schedule\.ramp_steps=0 .*at least 1"),
        (LengthSchedule, {"type": "log"}, r"max_new_tokens_schedule\.type='log' .*linear, cos"),
        (LengthSchedule, {"type": Ramp.sin}, r"max_new_tokens_schedule\.type='sin' .*linear, cos"),
        (ThresholdSchedule, {"start": 0.0}, r"threshold_schedule\.start=0.0 .*above 0, at most 1"),
        (ThresholdSchedule, {"end": 1.1}, r"threshold_schedule\.end=1.1 .*above 0, at most 1"),
        (ThresholdSchedule, {"hold_steps": -1}, r"threshold_schedule\.hold_steps=-1 .*at least 0"),
        (ThresholdSchedule, {"ramp_steps": 0}, r"threshold_schedule\.ramp_steps=0 .*at least 1"),
        (ThresholdSchedule, {"type": "log"}, r"threshold_schedule\.type='log' .*linear, cos, sin"),
        (BlockSizeSchedule, {"stages": ()}, r"block_size_schedule.*first_step=1"),
        (BlockSizeSchedule, {"stages": (BlockSizeStage(2, 4),)}, r"block_size_schedule.*first_step=1"),
        (
            BlockSizeSchedule,
            {"stages": (BlockSizeStage(1, 0),)},
            r"block_size_schedule\[0\]\.block_size=0 .*at least 1",
        ),
        (BlockSizeSchedule, {"stages": (BlockSizeStage(1, 4), BlockSizeStage(1, 8))}, r"\[1\]\.first_step=1 .*above 1"),
        (
            BlockSizeSchedule,
            {"stages": (BlockSizeStage(1, 4), BlockSizeStage(9, 6))},
            r"\[1\]\.block_size=6 .*multiple of 4",
        ),
        (
            BlockSizeSchedule,
            {"stages": (BlockSizeStage(1, 4), BlockSizeStage(9, 4))},
            r"\[1\]\.block_size=4 .*multiple of 4",
        ),
    ],
)
def test_impossible_schedules_are_refused_by_name(schedule: type, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedule(**arguments)
