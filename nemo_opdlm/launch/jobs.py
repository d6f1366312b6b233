"""A run as a job: its folder, the file of its configuration, and the command that reads it."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from hashlib import sha256
from pathlib import Path

from omegaconf import OmegaConf

from nemo_opdlm.cli import Point
from nemo_opdlm.config import Config, to_container

#: Folder in the log folder for what belongs to the job; exp_manager moves plain files away, and leaves folders alone.
LAUNCH = "launch"
_FILE = "config"
_UNSAFE = re.compile(r"[^\w.=+-]+", re.ASCII)
_LONGEST_NAME = 120


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: of the job, within a sweep with what was swept.
        config: of the run, with its log folder in `exp_manager.explicit_log_dir`.
        swept: what tells it from the other jobs of its sweep, key -> value; empty for a single run.
    """

    name: str
    config: Config
    swept: Mapping[str, str]

    @property
    def log_dir(self) -> Path:
        """exp_manager's folder: checkpoints, metrics.jsonl, logs."""
        return Path(str(self.config.exp_manager.explicit_log_dir))

    @property
    def folder(self) -> Path:
        """Where the configuration and the job's own output are."""
        return self.log_dir / LAUNCH

    @property
    def arguments(self) -> list[str]:
        """Arguments of the training script."""
        return [f"--config-path={self.folder}", f"--config-name={_FILE}"]

    def write(self) -> None:
        """Write the configuration of the run, whole: what the job trains does not change with files of this package."""
        self.folder.mkdir(parents=True, exist_ok=True)
        plain = to_container(self.config)
        training = {field.name: plain[field.name] for field in fields(Config)}
        text = OmegaConf.to_yaml(OmegaConf.create(training))
        partial = self.folder / f"{_FILE}.partial"
        partial.write_text(f"# {self.name}: what this job trains, key by key.\n{text}", encoding="utf-8")
        os.replace(partial, self.folder / f"{_FILE}.yaml")


def log_folder(config: Config) -> Path:
    """Where a run writes, as exp_manager decides; a launched run that names no folder writes to `run.results_dir`."""
    manager, run = config.exp_manager, config.run
    if manager.explicit_log_dir is not None:
        return Path(manager.explicit_log_dir).absolute()
    if manager.exp_dir is None and run.results_dir is not None:
        return (Path(run.results_dir) / "results").absolute()
    base = Path(manager.exp_dir or "nemo_experiments").absolute()
    return base / (manager.name or config.name) / (manager.version or "")


def single(config: Config, name: str) -> Job:
    """The job of a run that is no part of a sweep."""
    return Job(name, _in_folder(config, log_folder(config)), {})


def sweep(points: Sequence[Point[Config]], name: str) -> tuple[Path, list[Job]]:
    """The folder of a sweep and its jobs, each in a folder named after what was swept: the same sweep finds them again.

    Raises:
        ValueError: two jobs of the sweep are the same.
    """
    folder = log_folder(points[0].config)
    jobs: dict[str, Job] = {}
    for point in points:
        part = folder_name(point.swept)
        if part in jobs:
            raise ValueError(
                f"{', '.join(f'{key}={value}' for key, value in point.swept.items())} stands twice in this sweep"
            )
        jobs[part] = Job(f"{name}.{part}", _in_folder(point.config, folder / part), point.swept)
    return folder, list(jobs.values())


def folder_name(swept: Mapping[str, str]) -> str:
    """What was swept as the name of a folder: `model.opdlm.block_size=4+model.seed=1`; a hash where that is too long.

    No commas: on a command line a path with commas would be a sweep.
    """
    text = "+".join(f"{key}={value}" for key, value in sorted(swept.items()))
    name = _UNSAFE.sub("_", text)
    if name == text and len(name) <= _LONGEST_NAME:
        return name
    return f"{name[: _LONGEST_NAME - 9]}-{sha256(text.encode()).hexdigest()[:8]}"


def _in_folder(config: Config, folder: Path) -> Config:
    return replace(config, exp_manager=replace(config.exp_manager, explicit_log_dir=str(folder)))
