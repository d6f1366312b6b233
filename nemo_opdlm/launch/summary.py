"""What became of the jobs of a sweep: a table for the terminal, and the same as a CSV file in the sweep's folder."""

import csv
import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from nemo_opdlm.launch.jobs import Job

FILE = "sweep.csv"
FINISHED, FAILED, STOPPED, NOT_STARTED = "finished", "failed", "stopped", "not started"
_METRICS = ("val_loss", "train/loss", "rollout/tokens_per_s")
_READ = ("trained_tokens", *_METRICS)
_COLUMNS = ("status", "step", "max_steps", "max_trained_tokens", *_READ, "job_id", "log_dir")


@dataclass(frozen=True)
class Row:
    """A job of a sweep.

    Attributes:
        swept: key -> value.
        log_dir: exp_manager's folder.
        max_steps: steps of the whole run.
        status: `finished`, `stopped` (without an error, before its end), `failed`, `not started`, or Slurm's state.
        job_id: Slurm's, "" elsewhere.
        max_trained_tokens: tokens that end the whole run before `max_steps`; None = nothing does.
    """

    swept: dict[str, str]
    log_dir: Path
    max_steps: int
    status: str = NOT_STARTED
    job_id: str = ""
    max_trained_tokens: int | None = None

    @classmethod
    def of(cls, job: Job, status: str = NOT_STARTED, job_id: str = "") -> "Row":
        """The row of a job."""
        config = job.config
        assert config.trainer.max_steps is not None
        max_trained_tokens = config.model.opdlm.max_trained_tokens
        return cls(dict(job.swept), job.log_dir, config.trainer.max_steps, status, job_id, max_trained_tokens)

    @classmethod
    def ended(cls, job: Job, exit_code: int) -> "Row":
        """The row of a job whose process has ended."""
        row = cls.of(job)
        status = (FINISHED if row.has_ended else STOPPED) if exit_code == 0 else f"{FAILED} ({exit_code})"
        return replace(row, status=status)

    @property
    def is_well(self) -> bool:
        """Whether it is done, or still to be done by Slurm."""
        return not self.status.startswith((FAILED, STOPPED, NOT_STARTED))

    @property
    def has_ended(self) -> bool:
        """Whether its run has made all of its steps, or trained all of its tokens."""
        metrics, enough = self.metrics(), self.max_trained_tokens
        return metrics["step"] >= self.max_steps or (enough is not None and (metrics["trained_tokens"] or 0) >= enough)

    def metrics(self) -> dict[str, Any]:
        """The last step, and the last value of each metric of the table that the run has written; None without one."""
        file = self.log_dir / "metrics.jsonl"
        found: dict[str, Any] = {"step": 0, **dict.fromkeys(_READ)}
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        for line in lines:
            if line.startswith("{") and line.endswith("}"):  # a killed run may have left half a line
                row = json.loads(line)
                found["step"] = row["global_step"]
                found |= {name: row[name] for name in _READ if row.get(name) is not None}
        return found


def table(rows: Sequence[Row]) -> Table:
    """One line per job."""
    shown = Table(title=f"{len(rows)} jobs", title_justify="left")
    for name in (*_short_names(list(rows[0].swept)), "status", "step", "val_loss", "train/loss", "tokens/s"):
        shown.add_column(name, justify="left" if name == "status" else "right", overflow="fold")
    for row in rows:
        metrics = row.metrics()
        values = ["" if metrics[name] is None else f"{metrics[name]:.4g}" for name in _METRICS]
        shown.add_row(*row.swept.values(), row.status, f"{metrics['step']}/{row.max_steps}", *values)
    return shown


def _short_names(keys: list[str]) -> list[str]:
    """Keys without their sections, unless two would look the same."""
    short = [key.rpartition(".")[2] for key in keys]
    return short if len(set(short)) == len(keys) else keys


def write(folder: Path, rows: Sequence[Row]) -> Path:
    """Write `sweep.csv`; jobs of earlier sweeps into the same folder, of other values of the same keys, stay in it."""
    file = folder / FILE
    earlier = read(folder) if file.is_file() else []
    same_keys = [row for row in earlier if row.swept.keys() == rows[0].swept.keys()]
    merged = {row.log_dir: row for row in (*same_keys, *rows)}
    folder.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    with partial.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, [*rows[0].swept, *_COLUMNS])
        writer.writeheader()
        for row in merged.values():
            known = {name: value for name, value in vars(row).items() if name in _COLUMNS}
            writer.writerow(row.swept | row.metrics() | known)
    os.replace(partial, file)
    return file


def read(folder: Path) -> list[Row]:
    """The jobs of a sweep as they stood when its file was written.

    Raises:
        OSError: there is no such file.
        ValueError: it is not one of ours.
    """
    with (folder / FILE).open(encoding="utf-8", newline="") as stream:
        lines = csv.DictReader(stream)
        if not set(_COLUMNS) <= set(lines.fieldnames or ()):
            raise ValueError(f"{folder / FILE} is not the table of a sweep: it lacks columns such as log_dir")
        return [
            Row(
                {key: value for key, value in line.items() if key not in _COLUMNS},
                Path(line["log_dir"]),
                int(line["max_steps"]),
                line["status"],
                line["job_id"],
                int(line["max_trained_tokens"]) if line["max_trained_tokens"] else None,
            )
            for line in lines
        ]


def refreshed(row: Row) -> Row:
    """A job of Slurm as it stands now; other jobs as they are."""
    if not row.job_id:
        return row
    return replace(row, status=_queued(row.job_id) or (FINISHED if row.has_ended else STOPPED))


def _queued(job_id: str) -> str | None:
    """Slurm's state of a job that is waiting or running; None of one that has left the queue."""
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job_id}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise OSError(f"squeue is needed to ask for job {job_id}: call this on a machine of the cluster") from error
    return answer.stdout.strip().partition("\n")[0].lower() or None
