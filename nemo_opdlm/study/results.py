"""What the cells of a study found, and how variants are compared at equal trained tokens."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENS = "trained_tokens"


@dataclass(frozen=True)
class Result:
    """A cell that is done.

    Attributes:
        model, variant, seed: of the cell.
        points: evaluations in order, each with ``trained_tokens`` since the start of the first stage.
        decoding: figures of greedy text by mode; ``original`` is the AR model's.
    """

    model: str
    variant: str
    seed: int
    points: Sequence[Mapping[str, float]]
    decoding: Mapping[str, Mapping[str, float]]

    @property
    def num_tokens(self) -> float:
        """Tokens it was trained on."""
        return self.points[-1][TOKENS]

    def at(self, num_tokens: float, figure: str) -> float:
        """A figure after so many trained tokens, linear between two evaluations; before the first and after the last: theirs."""
        before = self.points[0]
        for point in self.points:
            if point[TOKENS] >= num_tokens:
                step = point[TOKENS] - before[TOKENS]
                share = (num_tokens - before[TOKENS]) / step if step > 0 else 1.0
                return before[figure] + max(0.0, share) * (point[figure] - before[figure])
            before = point
        return before[figure]

    def tokens_until(self, figure: str, target: float) -> float | None:
        """Trained tokens from which on a figure stays at most at a target, linear between two evaluations; None = it does not.

        A figure may have been there for a while before: the KL on a student's own states is low while its texts are all alike.
        """
        above = [number for number, point in enumerate(self.points) if point[figure] > target]
        if not above:
            return self.points[0][TOKENS]
        if above[-1] == len(self.points) - 1:
            return None
        before, after = self.points[above[-1]], self.points[above[-1] + 1]
        share = (before[figure] - target) / (before[figure] - after[figure])
        return before[TOKENS] + share * (after[TOKENS] - before[TOKENS])


def read_results(folder: str | Path) -> list[Result]:
    """Every result of a folder, by name.

    Raises:
        ValueError: there is none, or a file is none of ours.
    """
    files = sorted(Path(folder).glob("*.json"))
    if not files:
        raise ValueError(f"{folder} holds no results")
    return [_read(file) for file in files]


def _read(file: Path) -> Result:
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        points, trained = [], 0.0
        for stage in content["stages"]:
            points += [{**point, TOKENS: trained + point[TOKENS]} for point in stage["evaluations"]]
            trained = points[-1][TOKENS]
        decoding = content["stages"][-1]["decoding"]
        return Result(content["model"], content["variant"], content["seed"], points, decoding)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{file} is no result of a study: {type(error).__name__} {error}") from None


def models(results: Iterable[Result]) -> list[str]:
    """Names of the models, in order of the results."""
    return list(dict.fromkeys(result.model for result in results))


def of(results: Iterable[Result], model: str, variant: str) -> list[Result]:
    """The seeds of a variant."""
    return [result for result in results if (result.model, result.variant) == (model, variant)]


def shared_tokens(results: Iterable[Result]) -> float:
    """Trained tokens that all of them reach."""
    return min(result.num_tokens for result in results)


@dataclass(frozen=True)
class Spread:
    """A figure over seeds.

    Attributes:
        mean: over the seeds.
        low, high: smallest and largest.
    """

    mean: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Of at least one value."""
        return Spread(math.fsum(values) / len(values), min(values), max(values))
