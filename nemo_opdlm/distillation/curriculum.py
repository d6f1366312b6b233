"""Schedules as pure functions of the rollout step, which counts from 1: nothing to save, nothing to resume."""

import math
from dataclasses import dataclass
from enum import StrEnum

from nemo_opdlm.distillation._checks import check, member


class Ramp(StrEnum):
    """Shape of the way from start to end: even, slow at first (cos) or fast at first (sin)."""

    linear = "linear"
    cos = "cos"
    sin = "sin"


@dataclass(frozen=True)
class LengthSchedule:
    """Rollout-length curriculum: from `start` to `end` new tokens over `ramp_steps` rollout steps.

    `cos` is the official code's shape, `linear` the paper's.
    """

    start: int = 100
    end: int = 4000
    ramp_steps: int = 100
    type: Ramp = Ramp.cos

    def __post_init__(self) -> None:
        """Refuse lengths that are no curriculum."""
        key = "max_new_tokens_schedule"
        check(f"{key}.start", self.start, self.start >= 1, "at least 1 token")
        check(f"{key}.end", self.end, self.end >= self.start, f"at least start={self.start}")
        check(f"{key}.ramp_steps", self.ramp_steps, self.ramp_steps >= 1, "at least 1 rollout step")
        object.__setattr__(self, "type", member(Ramp, f"{key}.type", self.type))
        check(f"{key}.type", self.type.value, self.type != Ramp.sin, "linear, cos")


@dataclass(frozen=True)
class ThresholdSchedule:
    """Confidence threshold of dynamic remasking: `start` for `hold_steps` rollout steps, then to `end` in `ramp_steps`.

    Older official checkpoints held 0.9 for 150 steps and ended at 0.7; the released recipe has no schedule.
    """

    start: float = 0.9
    end: float = 0.7
    hold_steps: int = 150
    ramp_steps: int = 333
    type: Ramp = Ramp.linear

    def __post_init__(self) -> None:
        """Refuse thresholds that are no probabilities."""
        key = "threshold_schedule"
        check(f"{key}.start", self.start, 0 < self.start <= 1, "above 0, at most 1")
        check(f"{key}.end", self.end, 0 < self.end <= 1, "above 0, at most 1")
        check(f"{key}.hold_steps", self.hold_steps, self.hold_steps >= 0, "at least 0 rollout steps")
        check(f"{key}.ramp_steps", self.ramp_steps, self.ramp_steps >= 1, "at least 1 rollout step")
        object.__setattr__(self, "type", member(Ramp, f"{key}.type", self.type))


@dataclass(frozen=True)
class BlockSizeStage:
    """From rollout step `first_step` on, blocks of `block_size` tokens."""

    first_step: int
    block_size: int


@dataclass(frozen=True)
class BlockSizeSchedule:
    """Block-size curriculum. Each size divides the next, so blocks nest and the absolute grid is kept."""

    stages: tuple[BlockSizeStage, ...] = (BlockSizeStage(first_step=1, block_size=4),)

    def __post_init__(self) -> None:
        """Refuse stages out of order and blocks that do not nest."""
        key = "block_size_schedule"
        starts = bool(self.stages) and self.stages[0].first_step == 1
        check(key, self.stages, starts, "stages of which the first has first_step=1")
        check(f"{key}[0].block_size", self.stages[0].block_size, self.stages[0].block_size >= 1, "at least 1")
        for i, (before, stage) in enumerate(zip(self.stages, self.stages[1:], strict=False), start=1):
            later = stage.first_step > before.first_step
            check(f"{key}[{i}].first_step", stage.first_step, later, f"above {before.first_step}")
            nested = stage.block_size > before.block_size and stage.block_size % before.block_size == 0
            check(f"{key}[{i}].block_size", stage.block_size, nested, f"a larger multiple of {before.block_size}")


def rollout_length(step: int, spec: LengthSchedule, block_size: int) -> int:
    """Limit of new tokens at a rollout step: the nearest multiple of `block_size`, at least one block.

    Ties go to the even multiple. Raises ValueError for a step below 1.
    """
    length = _between(spec.start, spec.end, spec.type, _check_step(step) / spec.ramp_steps)
    return block_size * max(1, round(length / block_size))


def confidence_threshold(step: int, spec: ThresholdSchedule) -> float:
    """Confidence threshold at a rollout step. Raises ValueError for a step below 1."""
    return _between(spec.start, spec.end, spec.type, (_check_step(step) - spec.hold_steps) / spec.ramp_steps)


def block_size(step: int, spec: BlockSizeSchedule) -> int:
    """Block size at a rollout step. Raises ValueError for a step below 1."""
    _check_step(step)
    return [stage.block_size for stage in spec.stages if stage.first_step <= step][-1]


def _check_step(step: int) -> int:
    check("rollout_step", step, step >= 1, "1 for the first rollout")
    return step


def _between(start: float, end: float, ramp: Ramp, progress: float) -> float:
    progress = min(max(progress, 0.0), 1.0)
    shapes = {
        Ramp.linear: progress,
        Ramp.cos: 1 - math.cos(math.pi / 2 * progress),
        Ramp.sin: math.sin(math.pi / 2 * progress),
    }
    return start + (end - start) * shapes[ramp]
