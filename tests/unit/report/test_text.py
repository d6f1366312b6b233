"""What is shown on a terminal."""

import io
import logging
import re
import time
import warnings

import pytest
from rich.console import Console, RenderableType

from nemo_opdlm.diffusion.settings import RolloutProgress
from nemo_opdlm.report.figures import FIGURES
from nemo_opdlm.report.progress import RolloutBar
from nemo_opdlm.report.quiet import quiet_imports, quiet_runs
from nemo_opdlm.report.steps import unmasking_order
from nemo_opdlm.report.tables import before_after


def rendered(content: RenderableType, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=120, force_terminal=terminal, color_system="auto")
    console.print(content, end="")
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_table_has_a_row_per_figure_and_the_teachers_where_it_has_one() -> None:
    before = {figure.name: 1.234 for figure in FIGURES}
    after = {figure.name: 0.567 for figure in FIGURES}
    lines = rendered(before_after(before, after, {"repeat_4gram": 0.09}, "x before and after")).splitlines()
    rows = [line.split("│")[1:-1] for line in lines if line.startswith("│")]
    assert [row[0].strip() for row in rows] == [figure.title for figure in FIGURES]
    assert all((row[1].strip(), row[2].strip()) == ("1.23", "0.57") for row in rows)
    assert [row[3].strip() for row in rows] == ["0.09" if f.name == "repeat_4gram" else "" for f in FIGURES]


def test_the_order_of_unmasking_is_one_line_per_block() -> None:
    order = unmasking_order([" was", "\n", " go", "ing", " to"], [2, 1, 3, 3, 5], [1, 1, 2, 2, 3])
    assert rendered(order).splitlines() == [
        "  block   1  2:' was' 1:'\\n'",
        "  block   2  3:' go' 3:'ing'",
        "  block   3  5:' to'",
    ]


def test_tokens_of_one_forward_have_one_colour() -> None:
    order = unmasking_order(["a", "b", "c"], [7, 8, 7], [3, 3, 3])
    colour = {order.plain[span.start : span.end]: span.style for span in order.spans}
    assert colour["'a'"] == colour["'c'"] != colour["'b'"]
    assert "\x1b[" in rendered(order, terminal=True) and "\x1b[" not in rendered(order)


class Terminal(io.StringIO):
    """A stream that bars are drawn on."""

    def isatty(self) -> bool:
        return True


def progress(num_tokens: int, num_active: int) -> RolloutProgress:
    """Of two rows that have been through four forwards together and through one of them alone."""
    return RolloutProgress(num_forwards=5, num_row_forwards=9, num_active=num_active, num_rows=2, num_tokens=num_tokens)


def test_a_bar_shows_speed_tokens_per_forward_and_finished_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    bar = RolloutBar("Writing", 20)
    time.sleep(0.2)  # a bar is redrawn ten times a second
    bar(progress(18, num_active=1))
    bar.close()
    line = r"Writing: +90%.* 18/20 \[.*(tokens/s|s/ tokens), 1/2 responses, 2\.00 tokens per forward\]"
    assert re.search(line, terminal.getvalue())


def test_a_bar_adds_up_batches_and_never_passes_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = RolloutBar("Writing", 20)
    shown = []
    for tokens, active in ((0, 2), (4, 2), (8, 0), (0, 2), (14, 0)):
        bar(progress(tokens, active))
        shown.append(bar.num_tokens)
    bar.close()
    assert shown == [0, 4, 8, 8, 20]


def test_no_bar_is_drawn_where_stderr_is_no_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    bar = RolloutBar("Writing", 20)
    bar(progress(20, num_active=0))
    bar.close()
    assert capfd.readouterr() == ("", "")


def test_known_chatter_is_silenced_and_other_warnings_are_not() -> None:
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        quiet_imports()
        warnings.warn("Transformer Engine and Apex are not installed. Falling back", stacklevel=1)
        warnings.warn("the disk is full", stacklevel=1)
    assert [str(warning.message) for warning in heard] == ["the disk is full"]


def test_nemos_terminal_is_silenced_and_its_files_are_not(tmp_path: object) -> None:
    logger = logging.getLogger("nemo_logger")
    terminal, file = logging.StreamHandler(io.StringIO()), logging.FileHandler(f"{tmp_path}/log.txt")
    for handler in (terminal, file):
        logger.addHandler(handler)
    try:
        quiet_runs()
        assert (terminal.level, file.level) == (logging.ERROR, logging.NOTSET)
    finally:
        for handler in (terminal, file):
            logger.removeHandler(handler)
        file.close()
