"""Jobs through NeMo-Run: processes of this machine, or sbatch."""

import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from nemo_opdlm.cli import Point
from nemo_opdlm.config.launch import LaunchConfig
from nemo_opdlm.launch import summary
from nemo_opdlm.launch.jobs import Job, single, sweep

#: The folder of this package.
_ROOT = Path(__file__).resolve().parents[2]
_SUCCEEDED = "SUCCEEDED"
#: What NeMo-Run puts into a batch script without quotes, and Slurm reads without patterns.
_PLAIN = re.compile(r"[\w./=+,:@-]+", re.ASCII)


def launch(script: str | Path, config: LaunchConfig) -> int:
    """Launch one run.

    Args:
        script: the training script.
        config: as returned by `validate_launch`.

    Returns:
        An exit code: of a local run 0 if it succeeded, of a Slurm run 0 if Slurm accepted it.

    Raises:
        ValueError, OSError: NeMo-Run or Slurm is not there, or Slurm refuses the job.
    """
    launcher = _Launcher(Path(script), single(config, config.job_name))
    if config.dry_run:
        launcher.print_script()
        return 0
    row = launcher.launch()
    _console().print(f"{row.status}{f', job {row.job_id}' if row.job_id else ''}: {row.log_dir}")
    return int(not row.is_well)


def launch_sweep(script: str | Path, points: Sequence[Point[LaunchConfig]]) -> int:
    """Launch every run of a sweep, whatever becomes of the others; print and write its table.

    Local runs go one after the other. Jobs of Slurm are left to it: `examples/sweep_table.py` shows how they stand.

    Args:
        script: the training script.
        points: the runs, checked by `validate_launch`.

    Returns:
        As `launch`, of all runs.

    Raises:
        ValueError, OSError: NeMo-Run or Slurm is not there.
    """
    folder, jobs = sweep(points, points[0].config.job_name)
    launchers = [_Launcher(Path(script), job) for job in jobs]
    if points[0].config.dry_run:
        for launcher in launchers:
            launcher.print_script()
        return 0
    rows = [launcher.launch_or_report() for launcher in launchers]
    file = summary.write(folder, rows)
    _console().print(summary.table(rows))
    _console().print(f"written to {file}")
    return int(not all(row.is_well for row in rows))


class _Launcher:
    """A job as an experiment of NeMo-Run.

    Args:
        script: the training script.
        job: whose configuration is a `LaunchConfig`.

    Raises:
        ValueError, OSError: Slurm is not there, or a path cannot stand in a batch script.
    """

    def __init__(self, script: Path, job: Job) -> None:
        assert isinstance(job.config, LaunchConfig)
        self._script, self._job, self._config = script, job, job.config
        self._is_local = self._config.cluster.type == "local"
        if not self._is_local:
            for path in (job.log_dir, Path.cwd(), script, _ROOT, self._python):
                _check_path(str(path))
        if not (self._is_local or self._config.dry_run or shutil.which("sbatch")):
            raise OSError("sbatch is not on this machine: launch from one of the cluster's, or print with dry_run=true")

    def print_script(self) -> None:
        """Print the batch script, or the command of a local run, and leave nothing behind."""
        if self._is_local:
            sys.stdout.write(shlex.join([self._python, str(self._script), *self._job.arguments]) + "\n")
            return
        with self._experiment() as experiment:
            experiment.dryrun(log=False, delete_exp_dir=False)
            folder = Path(experiment.jobs[0].executor.experiment_dir)
            sys.stdout.write(min(folder.glob("*_sbatch.sh")).read_text(encoding="utf-8"))
            shutil.rmtree(folder)

    def launch(self) -> summary.Row:
        """Run the job here to its end, or hand it, with its chain, to Slurm.

        Raises:
            ValueError: NeMo-Run is not there.
            OSError: Slurm refuses it.
        """
        self._job.write()
        with self._experiment() as experiment:
            from invoke.exceptions import UnexpectedExit
            from torchx.specs import parse_app_handle

            try:
                experiment.run(detach=not self._is_local)
            except UnexpectedExit as error:
                reason = " ".join(error.result.stderr.split()) or f"exit code {error.result.exited}"
                raise OSError(f"Slurm refuses job {self._job.name}: {reason}") from error
        if self._is_local:
            (submitted,) = experiment.jobs
            return summary.Row.ended(self._job, int(submitted.state.name != _SUCCEEDED))
        # Of a chain its last job: while that is in the queue, the run is not over.
        ids = [int(parse_app_handle(submitted.handle)[2]) for submitted in experiment.jobs]
        return summary.Row.of(self._job, "submitted", str(max(ids)))

    def launch_or_report(self) -> summary.Row:
        """`launch`, but a refusal is the status of the row."""
        try:
            return self.launch()
        except OSError as error:
            _console().print(str(error))
            return summary.Row.of(self._job, summary.FAILED)

    @contextmanager
    def _experiment(self) -> Iterator[Any]:
        nemo_run = _nemo_run()
        # In clean mode: NeMo-Run's own reports would go where the batch script does.
        experiment = nemo_run.Experiment(
            self._job.name, log_level="WARN", clean_mode=True, enable_goodbye_message=False, skip_status_at_exit=True
        )
        with experiment:
            executor = (self._local_executor if self._is_local else self._slurm_executor)(nemo_run)
            task = nemo_run.Script(path=str(self._script), args=self._job.arguments, entrypoint=self._python)
            for _ in range(self._config.run.chain):
                experiment.add(task, executor=executor, name=self._job.name, tail_logs=self._is_local)
            yield experiment

    @property
    def _python(self) -> str:
        cluster = self._config.cluster
        return cluster.python or ("python3" if cluster.container_image else sys.executable)

    def _local_executor(self, nemo_run: Any) -> Any:
        return nemo_run.LocalExecutor(
            env_vars={key: str(value) for key, value in self._config.cluster.env_vars.items()}
        )

    def _slurm_executor(self, nemo_run: Any) -> Any:
        """One task per GPU; the training script finds its rank, and the first node, in Slurm's variables."""
        cluster, trainer = self._config.cluster, self._config.trainer
        environment = self._environment()
        executor = nemo_run.SlurmExecutor(
            account=cluster.account,
            partition=cluster.partition,
            time=self._config.run.time_limit,
            nodes=trainer.num_nodes,
            ntasks_per_node=trainer.devices,
            gpus_per_node=_gpus_per_node(self._config),
            cpus_per_task=cluster.cpus_per_task,
            mem=None if cluster.mem is None else str(cluster.mem),
            qos=cluster.qos,
            constraint=cluster.constraint,
            exclude=cluster.exclude,
            exclusive=cluster.exclusive or None,
            signal=cluster.signal,
            additional_parameters=_further_flags(self._config),
            container_image=cluster.container_image,
            container_mounts=self._mounts(),
            container_env=list(environment),  # else an image's own variables win
            srun_args=[*self._srun_args(), *cluster.srun_args],
            setup_lines="\n".join(cluster.setup) or None,
            env_vars=environment,
            packager=nemo_run.Packager(),
            tunnel=nemo_run.LocalTunnel(job_dir=""),
            retries=cluster.max_retries,
            poll_estimated_start_time=False,
        )
        executor.job_details.job_name = self._job.name
        executor.job_details.folder = str(self._job.folder)
        return executor

    def _environment(self) -> dict[str, str]:
        """As the batch script exports it: shell text."""
        own = {"MASTER_ADDR": "$head_node"}  # the batch script's own variable
        if _is_checkout():
            own["PYTHONPATH"] = f"{_ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"
        return own | {key: shlex.quote(str(value)) for key, value in self._config.cluster.env_vars.items()}

    def _mounts(self) -> list[str]:
        if self._config.cluster.container_image is None:
            return []
        own = dict.fromkeys((Path.cwd(), _ROOT if _is_checkout() else self._script.parent, self._job.log_dir))
        return [*self._config.cluster.container_mounts, *(f"{folder}:{folder}" for folder in own)]

    def _srun_args(self) -> list[str]:
        """The working folder again, as the last one counts: NeMo-Run's lacks the files that keys may name."""
        if self._config.cluster.container_image is None:
            return [f"--chdir={Path.cwd()}"]
        return [f"--container-workdir={Path.cwd()}", "--no-container-mount-home"]


def _is_checkout() -> bool:
    """Whether jobs run this folder's code; else what is installed where they run."""
    return (_ROOT / "pyproject.toml").is_file()


def _check_path(path: str) -> None:
    """Refuse what would be read otherwise in a batch script.

    Raises:
        ValueError: it would.
    """
    if not _PLAIN.fullmatch(path):
        raise ValueError(f"{path!r} may not stand in a batch script: only letters, digits and ./_=+,:@-")
    if "/nemo_run" in path:
        raise ValueError(f"{path!r} may not hold '/nemo_run': NeMo-Run puts a folder of its own in its place")


def _console() -> Console:
    return Console(stderr=True, highlight=False, markup=False, soft_wrap=True)


def _nemo_run() -> Any:
    try:
        import nemo_run
    except ImportError as error:
        raise ValueError(
            f"NeMo-Run cannot be imported ({error}): pip install --no-deps --requirement requirements-launch.txt"
        ) from error
    return nemo_run


def _gpus_per_node(config: LaunchConfig) -> int | None:
    if config.trainer.accelerator == "cpu" or config.cluster.gpus_per_node == 0:
        return None
    assert isinstance(config.trainer.devices, int)
    return config.trainer.devices


def _further_flags(config: LaunchConfig) -> dict[str, str | bool]:
    """sbatch flags that the executor has no field for."""
    cluster = config.cluster
    flags = {"dependency": config.run.dependency, "nodelist": cluster.nodelist, "reservation": cluster.reservation}
    return {"requeue": True} | {key: value for key, value in flags.items() if value is not None}
