"""Keys of `examples/launch.py` beside those of a training run; the one home of their defaults."""

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from functools import reduce
from pathlib import Path
from typing import Any, Literal

from nemo_opdlm.config.precision import assume_capable_gpus
from nemo_opdlm.config.schema import Config
from nemo_opdlm.config.validation import validate

_TIME_LIMIT = re.compile(r"(?:(\d+)-)?(\d{1,2}):(\d{2}):(\d{2})")
_SIGNAL = re.compile(r"(?:SIG)?[A-Z][A-Z0-9]+@(\d+)")
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")
_NAME = re.compile(r"[\w.=+-]+", re.ASCII)


@dataclass(frozen=True)
class ClusterConfig:
    """Where a run is launched. `conf/cluster/` has a file for each type; all keys but three are Slurm's.

    Attributes:
        type: `local` = processes of this machine, `slurm` = jobs of a cluster that this machine can submit to; required.
        env_vars: environment of the training processes, by names in capitals.
        python: interpreter of the training processes; null = the one that launches, in a container `python3`.
        account: required for Slurm.
        partition, qos, constraint, reservation, nodelist, exclude, mem, cpus_per_task, exclusive: as for sbatch.
        gpus_per_node: GPUs to ask for; null = `trainer.devices`, 0 = none: where a node is always given whole.
        job_name_prefix: before `run.name`.
        container_image: image for Pyxis (`srun --container-image`); null = no container.
        container_mounts: `/outside:/inside`, beside the working folder and this package's folder, which are always mounted.
        srun_args: further arguments of srun.
        setup: lines of the batch script ahead of training, such as `module load cuda`.
        signal: SIGNAL@SECONDS: what training is told so long before the time limit, should it still be running.
        max_retries: how often a job that ends with an exit code other than 0 is queued again, preempted ones included.
    """

    type: Literal["local", "slurm"] | None = None
    env_vars: dict[str, str | int] = field(default_factory=dict)
    python: str | None = None

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    nodelist: str | None = None
    exclude: str | None = None
    mem: str | int | None = None
    cpus_per_task: int | None = None
    exclusive: bool = False
    gpus_per_node: int | None = None
    job_name_prefix: str = ""
    container_image: str | None = None
    container_mounts: tuple[str, ...] = ()
    srun_args: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    signal: str = "USR1@120"
    max_retries: int = 3


@dataclass(frozen=True)
class LaunchConfig(Config):
    """A training run and where to launch it.

    Attributes:
        cluster: where.
        dry_run: print what would be submitted, and submit nothing.
    """

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    dry_run: bool = False

    @property
    def job_name(self) -> str:
        """Name of the job."""
        return self.cluster.job_name_prefix + (self.run.name or self.name)


#: Keys that name what a run reads.
_FILES = (
    "model.restore_from_path",
    "model.kd_teacher_restore_from_path",
    "model.tokenizer.type",
    "model.data.train_ds.file_path",
    "model.data.validation_ds.file_path",
)
#: Keys that the local executor uses, too.
_LOCAL_KEYS = ("type", "env_vars", "python")
_RANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "cluster.env_vars": (lambda v: all(map(_VARIABLE.fullmatch, v)), "a mapping from names in capitals"),
    "cluster.gpus_per_node": (lambda v: v >= 0, "at least 0, or null"),
    "cluster.cpus_per_task": (lambda v: v >= 1, "at least 1, or null"),
    "cluster.job_name_prefix": (
        lambda v: v == "" or _NAME.fullmatch(v),
        "of letters, digits, '.', '_', '=', '+' and '-'",
    ),
    "cluster.container_mounts": (
        lambda v: all(m.startswith("/") and ":/" in m for m in v),
        "a list of '/outside:/inside'",
    ),
    "cluster.signal": (_SIGNAL.fullmatch, "SIGNAL@SECONDS, such as 'USR1@120'"),
    "cluster.max_retries": (lambda v: v >= 0, "at least 0"),
    "run.time_limit": (_TIME_LIMIT.fullmatch, "a time 'D-HH:MM:SS' or 'HH:MM:SS'"),
    "run.margin_minutes": (lambda v: v > 0, "above 0"),
    "run.chain": (lambda v: v >= 1, "at least 1"),
}


def validate_launch(config: LaunchConfig) -> LaunchConfig:
    """Check a run and its cluster before anything is submitted; fill in the ranks and `exp_manager.max_time_per_run`.

    Of a Slurm run only its own cluster knows the GPUs, and of a containerised one the files: the job checks those.

    Raises:
        ValueError: a value is out of range, missing, or contradicts another.
        FileNotFoundError: a path does not exist.
    """
    cluster = config.cluster
    if cluster.type is None:
        raise ValueError("cluster.type=None must be given: add +cluster=local or +cluster=slurm")
    for key, (accepts, rule) in _RANGES.items():
        section, _, name = key.partition(".")
        value = getattr(getattr(config, section), name)
        if value is not None and not accepts(value):
            raise ValueError(f"{key}={value!r} must be {rule}")
    if not _NAME.fullmatch(config.job_name):
        raise ValueError(f"run.name={config.job_name!r} must be of letters, digits, '.', '_', '=', '+' and '-'")
    if cluster.type == "local":
        _check_local(config)
    else:
        config = _with_time(_with_ranks(config))
        _check_slurm(config)
    _check_run(config)
    return config


def time_limit(config: Config) -> timedelta:
    """`run.time_limit`, whose form has been checked."""
    found = _TIME_LIMIT.fullmatch(config.run.time_limit)
    assert found is not None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def _check_run(config: LaunchConfig) -> None:
    """As training will, less what it will log."""
    logger = logging.getLogger(validate.__module__)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        if config.cluster.type == "local":
            validate(config)
            return
        with assume_capable_gpus():
            validate(config, check_files=config.cluster.container_image is None, environment={})
    finally:
        logger.setLevel(level)


def _check_local(config: LaunchConfig) -> None:
    default = ClusterConfig()
    for item in fields(ClusterConfig):
        value = getattr(config.cluster, item.name)
        if item.name not in _LOCAL_KEYS and value != getattr(default, item.name):
            raise ValueError(f"cluster.{item.name}={value!r} contradicts cluster.type='local'; use +cluster=slurm")
    if config.trainer.num_nodes > 1:
        raise ValueError(
            f"trainer.num_nodes={config.trainer.num_nodes} contradicts cluster.type='local'; use +cluster=slurm"
        )
    if config.run.chain > 1:
        raise ValueError(
            f"run.chain={config.run.chain} contradicts cluster.type='local': there is no time limit; use 1"
        )


def _with_ranks(config: LaunchConfig) -> LaunchConfig:
    """One task per GPU, `trainer.devices` of them on each node."""
    devices, gpus = config.trainer.devices, config.cluster.gpus_per_node
    if devices == "auto" or devices == -1:
        if not gpus:
            raise ValueError(f"trainer.devices={devices!r} needs cluster.gpus_per_node={gpus} to be a number of GPUs")
        devices = gpus
    if config.trainer.accelerator == "cpu":
        if gpus:
            raise ValueError(f"cluster.gpus_per_node={gpus} contradicts trainer.accelerator='cpu'; use null")
    elif gpus and gpus != devices:
        raise ValueError(
            f"cluster.gpus_per_node={gpus} contradicts trainer.devices={devices}: each GPU has one task; use "
            f"trainer.devices={gpus}"
        )
    return replace(config, trainer=replace(config.trainer, devices=devices))


def _with_time(config: LaunchConfig) -> LaunchConfig:
    run, manager = config.run, config.exp_manager
    limit, margin = time_limit(config), timedelta(minutes=run.margin_minutes)
    if manager.max_time_per_run is not None:
        return config
    if limit <= margin:
        raise ValueError(
            f"run.margin_minutes={run.margin_minutes:g} must be below run.time_limit={run.time_limit!r}: nothing would be trained"
        )
    return replace(config, exp_manager=replace(manager, max_time_per_run=_lightning_time(limit - margin)))


def _check_slurm(config: LaunchConfig) -> None:
    cluster, run = config.cluster, config.run
    if cluster.account is None:
        raise ValueError("cluster.account=None must be given: the Slurm account that pays for the job")
    if run.chain > 1 and run.dependency != "singleton":
        raise ValueError(
            f"run.chain={run.chain} needs run.dependency={run.dependency!r} to be 'singleton': else the jobs run at once"
        )
    if run.chain > 1 and not config.exp_manager.resume_if_exists:
        raise ValueError(f"run.chain={run.chain} needs exp_manager.resume_if_exists=True: else every job starts anew")
    lead = _SIGNAL.fullmatch(cluster.signal)
    assert lead is not None
    if timedelta(seconds=int(lead[1])) >= time_limit(config):
        raise ValueError(f"cluster.signal={cluster.signal!r} must come within run.time_limit={run.time_limit!r}")
    if cluster.container_image is None and cluster.container_mounts:
        raise ValueError(f"cluster.container_mounts={list(cluster.container_mounts)} needs cluster.container_image")
    if cluster.container_image is not None:
        _check_mounts(config)


def _check_mounts(config: LaunchConfig) -> None:
    inside = [Path(mount.split(":")[1]) for mount in config.cluster.container_mounts] + [Path.cwd()]
    for key in _FILES:
        path: str | None = reduce(getattr, key.split("."), config)  # type: ignore[assignment]
        if path is not None and not any(Path.cwd().joinpath(path).is_relative_to(folder) for folder in inside):
            raise ValueError(
                f"{key}={path!r} lies in no folder of cluster.container_mounts={list(config.cluster.container_mounts)}: the "
                "container would not see it"
            )


def _lightning_time(time: timedelta) -> str:
    """DD:HH:MM:SS."""
    minutes, seconds = divmod(int(time.total_seconds()), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    return f"{days:02}:{hours:02}:{minutes:02}:{seconds:02}"
