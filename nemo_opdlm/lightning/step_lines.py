"""Files of one JSON object per line, each of an optimizer step, that a resumed run continues."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO


class StepLines:
    """A file in exp_manager's log folder whose lines have a `global_step`.

    A resumed run continues it: exp_manager moved it to `run_<n>` at the start, from where it is taken back as far as the
    step the run resumes from. A fresh run begins a new file.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream: TextIO | None = None
        self._last_start = 0

    @property
    def is_open(self) -> bool:
        """Whether lines can be written; on ranks other than the first they never can."""
        return self._stream is not None

    def open(self, step: int) -> dict[str, Any]:
        """Recover the lines up to this step, 0 begins a new file; returns the step's own line, which can be rewritten."""
        lines = _lines_until(_previous_file(self.path, step), step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        recovered = self.path.with_suffix(".partial")
        recovered.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        os.replace(recovered, self.path)
        self._stream = self.path.open("a", encoding="utf-8")
        last: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        if last.get("global_step") != step:
            return {}
        self._last_start = self._stream.tell() - len(lines[-1].encode()) - 1
        return last

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a line."""
        assert self._stream is not None
        self._last_start = self._stream.tell()
        self._append(row)

    def rewrite_last(self, row: Mapping[str, Any]) -> None:
        """Put another line in the place of the last one."""
        assert self._stream is not None
        self._stream.truncate(self._last_start)
        self._append(row)

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _append(self, row: Mapping[str, Any]) -> None:
        assert self._stream is not None
        self._stream.write(json.dumps(row, allow_nan=False) + "\n")
        self._stream.flush()


def _previous_file(path: Path, step: int) -> Path | None:
    """The newest such file that reaches `step`; else the newest there is; None for a fresh run."""
    if step == 0:
        return None
    runs = [run for run in path.parent.glob("run_*") if run.name.removeprefix("run_").isdigit()]
    runs.sort(key=lambda run: int(run.name.removeprefix("run_")), reverse=True)
    files = [file for file in (path, *(run / path.name for run in runs)) if file.is_file()]
    return next((file for file in files if _last_step(file) >= step), files[0] if files else None)


def _last_step(path: Path) -> int:
    return max((json.loads(line)["global_step"] for line in _whole_lines(path)), default=0)


def _lines_until(path: Path | None, step: int) -> list[str]:
    if path is None:
        return []
    return [line for line in _whole_lines(path) if json.loads(line)["global_step"] <= step]


def _whole_lines(path: Path) -> list[str]:
    """Lines of such a file; a killed process may have left half of one at its end."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("{") and line.endswith("}")]
