"""The course of a training run as one picture."""

import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CAPTION = (
    "The on-policy KL need not fall monotonically: it is measured on half-masked states of the student's own texts, "
    "which change as the student improves. The held-out KL is measured on the same states every time, made from the "
    "teacher's own texts: it is the number to trust."
)
_SMOOTHING = 0.05


@dataclass(frozen=True)
class Panel:
    """One coordinate system.

    Attributes:
        title: what it shows.
        key: of `metrics.jsonl`.
        every_step: the key is in every line, and noisy: a smoothed line goes over it.
    """

    title: str
    key: str
    every_step: bool = True


_PANELS = (
    Panel("on-policy KL (training loss), nats per token", "train/loss"),
    Panel("held-out KL, nats per token", "val_loss", every_step=False),
    Panel("response quality: tokens that are the teacher's first choice", "train/agreement"),
    Panel("tokens per forward pass in rollouts", "rollout/tokens_per_forward"),
)


def read_metrics(path: str | Path) -> list[dict[str, float]]:
    """The lines of a run's `metrics.jsonl`.

    Raises:
        ValueError: there are none, or one is no JSON object.
    """
    rows = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: invalid JSON, {error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}:{number}: must be a JSON object, got {type(row).__name__}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} holds no metrics")
    return rows


def series(
    rows: Sequence[Mapping[str, Any]], key: str, known: Mapping[int, float] | None = None
) -> tuple[list[int], list[float]]:
    """Steps and values of one metric where it is there and finite, with the ``known`` values of further steps."""
    values = {int(row["global_step"]): float(row[key]) for row in rows if row.get(key) is not None}
    values |= known or {}
    steps = sorted(values)
    return steps, [values[step] for step in steps]


def smoothed(values: Sequence[float], weight: float = _SMOOTHING) -> list[float]:
    """Exponential moving average, without the pull of its start."""
    result, total, norm = [], 0.0, 0.0
    for value in values:
        total += weight * (value - total)
        norm += weight * (1 - norm)
        result.append(total / norm)
    return result


def plot_curves(
    rows: Sequence[Mapping[str, Any]], path: str | Path, title: str, heldout: Mapping[int, float] | None = None
) -> None:
    """Draw a run.

    Args:
        rows: of ``read_metrics``.
        path: PNG to write.
        title: heading.
        heldout: held-out KL by optimizer step, measured beside the run (before and after it).
    """
    import matplotlib

    matplotlib.use("Agg")  # no window, no display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7.5))
    for panel, ax in zip(_PANELS, axes.flat, strict=True):
        _draw(ax, panel, *series(rows, panel.key, heldout if panel.key == "val_loss" else None))
    figure.suptitle(title)
    figure.text(0.02, 0.01, textwrap.fill(_CAPTION, 150), fontsize=9, va="bottom")
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw(ax: "Axes", panel: Panel, steps: list[int], values: list[float]) -> None:
    if panel.every_step:
        ax.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1)
        ax.plot(steps, smoothed(values), color="tab:blue")
    else:
        ax.plot(steps, values, color="tab:red", marker="o", markersize=4)
        ax.set_ylim(0, 1.1 * max(values, default=1.0))
    ax.set_title(panel.title, fontsize=10)
    ax.set_xlabel("optimizer step")
    ax.grid(alpha=0.3)
