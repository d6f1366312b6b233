"""A sweep on this machine: a process per job, one after the other, since each takes all devices of its run."""

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from nemo_opdlm.cli import Point
from nemo_opdlm.config import Config
from nemo_opdlm.launch import summary
from nemo_opdlm.launch.jobs import Job, sweep

_INTERRUPTED = 130


def run_sweep(script: str | Path, points: Sequence[Point[Config]]) -> int:
    """Run every job, whatever becomes of the others; print and write the table of the sweep.

    Megatron's groups and NeMo's loggers outlive a run in its process, hence a process each. A job that was stopped goes on
    when the same sweep is started again.

    Args:
        script: the training script.
        points: the runs.

    Returns:
        An exit code: 0 if all jobs succeeded, 130 after Ctrl-C, else 1.

    Raises:
        ValueError: a launcher has started this process, and others that would all run the sweep.
    """
    # Lightning leaves LOCAL_RANK behind in a process that has trained on one rank.
    is_one_of_several = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1
    if is_one_of_several or "LOCAL_WORLD_SIZE" in os.environ or "SLURM_PROCID" in os.environ:
        raise ValueError("--multirun starts the processes of each run itself: call it without torchrun and srun")
    console = Console(stderr=True, highlight=False, markup=False)
    folder, jobs = sweep(points, points[0].config.name)
    rows = [summary.Row.of(job) for job in jobs]
    exit_code = 0
    for number, job in enumerate(jobs):
        console.rule(f"{number + 1}/{len(jobs)} {', '.join(f'{key}={value}' for key, value in job.swept.items())}")
        try:
            rows[number] = summary.Row.ended(job, _run(script, job))
        except KeyboardInterrupt:
            rows[number] = replace(rows[number], status=summary.STOPPED)
            exit_code = _INTERRUPTED
            break
    file = summary.write(folder, rows)
    console.print(summary.table(rows))
    console.print(f"written to {file}")
    return exit_code or int(not all(row.is_well for row in rows))


def _run(script: str | Path, job: Job) -> int:
    job.write()
    process = subprocess.Popen([sys.executable, str(script), *job.arguments])
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()  # it was interrupted, too, and may be saving
        raise
