"""A student before and after training, as a table for the terminal."""

from collections.abc import Mapping

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
