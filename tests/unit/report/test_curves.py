"""Curves of a run."""

from pathlib import Path

import pytest

from nemo_opdlm.report.curves import plot_curves, read_metrics, series, smoothed

ROWS = [
    {"global_step": 1, "train/loss": 3.0, "train/agreement": 0.1, "rollout/tokens_per_forward": 1.0},
    {"global_step": 2, "train/loss": None, "train/agreement": 0.2, "val_loss": 4.0},
    {"global_step": 3, "train/loss": 2.0, "train/agreement": 0.3, "rollout/tokens_per_forward": 1.2},
]


def test_a_series_has_the_steps_at_which_a_metric_is_known() -> None:
    assert series(ROWS, "train/loss") == ([1, 3], [3.0, 2.0])
    assert series(ROWS, "val_loss") == ([2], [4.0])
    assert series(ROWS, "val_loss", {3: 3.5, 0: 5.0}) == ([0, 2, 3], [5.0, 4.0, 3.5])


def test_smoothing_keeps_a_constant_and_stays_within_the_values() -> None:
    assert smoothed([2.0] * 5) == pytest.approx([2.0] * 5)
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    result = smoothed(values)
    assert result[0] == pytest.approx(3.0) and all(1.0 <= value <= 5.0 for value in result)
    assert smoothed([]) == []


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1]])
def test_a_run_of_any_length_becomes_a_png(tmp_path: Path, rows: list[dict[str, float]]) -> None:
    plot_curves(rows, tmp_path / "curves.png", "a run", {0: 4.5})
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no metrics"),
        ('{"global_step": 1}\n{"glo', ":2: invalid JSON"),
        ("[1]\n", ":1: must be a JSON object"),
    ],
)
def test_a_file_without_metrics_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_metrics(tmp_path / "metrics.jsonl")


def test_metrics_are_read_as_they_were_written(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"global_step": 1, "a": null}\n{"global_step": 2}\n', encoding="utf-8")
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"global_step": 1, "a": None}, {"global_step": 2}]
