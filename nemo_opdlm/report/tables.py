"""A student before and after training, as a table for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from nemo_opdlm.report.figures import FIGURES

_CAPTION = (
    "The held-out KL is the number to trust: its states are fixed, and made from the teacher's own texts. A student "
    "that repeats itself scores well on likelihood and agreement: read those beside the repeated 4-grams. The KL on "
    "its own states need not fall, as the states change with the student."
)


def before_after(
    before: Mapping[str, float], after: Mapping[str, float], teacher: Mapping[str, float], title: str
) -> Table:
    """One row per figure.

    Args:
        before, after: the student's figures by name (``figures.FIGURES``).
        teacher: the teacher's own, where it has one.
        title: heading.
    """
    table = Table(title=title, title_justify="left", caption=_CAPTION, caption_justify="left")
    table.add_column("")
    for name in ("before", "after", "teacher"):
        table.add_column(name, justify="right")
    table.add_column("better")
    for figure in FIGURES:
        values = [
            f"{column[figure.name]:.{figure.digits}f}" if figure.name in column else ""
            for column in (before, after, teacher)
        ]
        better = figure.better or "like teacher"
        table.add_row(figure.title, *values, better, style="bold" if figure.name == "heldout_kl" else "")
    return table


def side_by_side(columns: Sequence[Mapping[str, Any]], title: str) -> Table:
    """One column for each model and mode, one row for each figure that any of them has.

    Args:
        columns: with `model`, `mode`, `figures` (``figures.FIGURES``) and `tasks` (name -> result) each.
        title: heading.
    """
    caption = _CAPTION if any(column["figures"] for column in columns) else None
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("")
    for column in columns:
        table.add_column(f"{column['model']}\n{column['mode']}", justify="right")
    for figure in FIGURES:
        values = [column["figures"].get(figure.name) for column in columns]
        if any(value is not None for value in values):
            table.add_row(figure.title, *(_number(value, figure.digits) for value in values))
    for name in columns[0]["tasks"]:
        table.add_section()
        _add_task(table, name, [column["tasks"][name] for column in columns])
    return table


def _add_task(table: Table, name: str, results: Sequence[Mapping[str, Any]]) -> None:
    first = results[0]
    scores = [f"{_number(result['value'], 3)} ± {_number(result['standard_error'], 3)}" for result in results]
    table.add_row(f"{name}: {first['metric']}, {first['num_questions']} questions", *scores, style="bold")
    # Not all have all: an error of likelihoods, for one, only those whose states were drawn.
    for detail in dict.fromkeys(detail for result in results for detail in result["details"]):
        table.add_row(f"{name}: {detail}", *(_number(result["details"].get(detail), 3) for result in results))
    if first["tokens_per_forward"] is not None:
        table.add_row(f"{name}: tokens per forward", *(_number(result["tokens_per_forward"], 2) for result in results))


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
