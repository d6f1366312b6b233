"""Runs the cells of a study that are still to be done: a process for each stage, one after the other."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_opdlm.study.plan import Cell, Subject

_DIGITS = 5


@dataclass(frozen=True)
class Folders:
    """Where a study lives.

    Attributes:
        work: models, logs and checkpoints; what a cell needs no more is removed when it is done.
        results: a small JSON file for each cell.
    """

    work: Path
    results: Path

    def original(self, subject: Subject) -> Path:
        """The converted AR model."""
        return self.work / f"{subject.name}.nemo"

    def stage(self, cell: Cell, number: int) -> Path:
        """Of a stage, counted from 1."""
        return self.work / cell.name / str(number)

    def result(self, cell: Cell) -> Path:
        """Of a cell that is done."""
        return self.results / f"{cell.name}.json"


class StageFailed(RuntimeError):
    """The process of a stage ended with an error."""


def run_study(cells: Sequence[Cell], folders: Folders, tell: Callable[[str], None]) -> list[Cell]:
    """Run every cell that has no result yet, whatever becomes of the others; returns those that failed.

    A stage that was stopped goes on at its last checkpoint.
    """
    failed = []
    for number, cell in enumerate(cells, start=1):
        if folders.result(cell).is_file():
            continue
        start = time.monotonic()
        try:
            _run_cell(cell, folders)
        except StageFailed as error:
            failed.append(cell)
            tell(f"{number}/{len(cells)} {cell.name}: {error}")
        else:
            tell(f"{number}/{len(cells)} {cell.name}: {time.monotonic() - start:.0f} s")
    return failed


def _run_cell(cell: Cell, folders: Folders) -> None:
    original = student = folders.original(cell.subject)
    _convert(cell.subject, original)
    stages: list[dict[str, Any]] = []
    for number, stage in enumerate(cell.stages, start=1):
        folder = folders.stage(cell, number)
        result = folder / "result.json"
        paths = {
            "model.restore_from_path": student,
            "model.kd_teacher_restore_from_path": original,
            "exp_manager.explicit_log_dir": folder / "log",
        }
        overrides = cell.overrides(stage)
        if not result.is_file():
            _run_stage(folder, result, [*overrides, *(f"{key}={path}" for key, path in paths.items())])
        student = folder / "student.nemo"
        stages.append({"overrides": overrides, **json.loads(result.read_text(encoding="utf-8"))})
    folders.results.mkdir(parents=True, exist_ok=True)
    _write(
        folders.result(cell), {"model": cell.subject.name, "variant": cell.variant, "seed": cell.seed, "stages": stages}
    )
    for number in range(1, len(stages) + 1):
        shutil.rmtree(folders.stage(cell, number) / "log" / "checkpoints", ignore_errors=True)


def _convert(subject: Subject, path: Path) -> None:
    if path.is_file():
        return
    from nemo_opdlm.report.quiet import quiet_imports

    quiet_imports()
    from nemo_opdlm.convert.sources import fetch
    from nemo_opdlm.models.conversion import convert_hf_to_nemo

    path.parent.mkdir(parents=True, exist_ok=True)
    convert_hf_to_nemo(fetch(subject.name), path, mask_token=subject.mask_token)


def _run_stage(folder: Path, result: Path, overrides: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    files = ["--student", str(folder / "student.nemo"), "--result", str(result)]
    command = [sys.executable, "-m", "nemo_opdlm.study", *files, *overrides]
    output = folder / "output.txt"
    with output.open("ab") as stream:
        exit_code = subprocess.run(command, stdout=stream, stderr=stream, check=False).returncode
    if exit_code != 0 or not result.is_file():
        raise StageFailed(f"stopped with {exit_code}, see {output}")


def _write(path: Path, result: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(_rounded(result), indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def _rounded(value: Any) -> Any:
    """With fewer digits: the files are kept in the repository."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value
