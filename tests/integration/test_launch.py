"""examples/launch.py renders the batch scripts in tests/golden/launch; a sweep trains."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from nemo_opdlm.launch import summary
from tests.integration.training_runs import COMMON, EXAMPLES, TINY, run_script, tiny_inputs

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
#: Name of the golden file -> arguments.
SCRIPTS = {
    "two_nodes_in_a_container": (
        "trainer.num_nodes=2",
        "trainer.devices=8",
        "cluster.container_image='nvcr.io#nvidia/pytorch:26.01-py3'",
        "cluster.container_mounts=[/data:/data]",
        "cluster.setup=[module load slurm]",
        "cluster.srun_args=['--mpi=pmix']",
        "++cluster.env_vars.NCCL_DEBUG=INFO",
        "++cluster.env_vars.NCCL_IB_HCA='mlx5_0,mlx5_1'",
    ),
    "on_the_cpu": (
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "cluster.partition=batch",
        "cluster.exclusive=false",
        "cluster.max_retries=0",
        "run.time_limit=0-02:00:00",
        "run.dependency=null",
    ),
}


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Arguments of any launch from `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ar.nemo").touch()
    (tmp_path / "prompts.jsonl").touch()
    return (
        "model.restore_from_path=ar.nemo",
        "model.data.train_ds.file_path=prompts.jsonl",
        "trainer.max_steps=100",
        "model.global_batch_size=16",
        f"exp_manager.explicit_log_dir={tmp_path}/log",
    )


def launch(folder: Path, *arguments: str) -> str:
    """What a dry run prints, in a process of its own: NeMo-Run takes over standard error."""
    if find_spec("nemo_run") is None:
        pytest.skip("needs requirements-launch.txt")
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / "launch.py"), *arguments, "dry_run=true"],
        env={**os.environ, "NEMORUN_HOME": str(folder / "home"), "PYTHONPATH": str(EXAMPLES.parent)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert finished.returncode == 0, finished.stderr
    assert not (folder / "log").exists() and not list((folder / "home").rglob("*.sh"))
    return finished.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_batch_script_is_the_golden_one(name: str, prompts: tuple[str, ...], tmp_path: Path) -> None:
    script = launch(tmp_path, "+cluster=slurm", "cluster.account=research", *prompts, *SCRIPTS[name])
    script = re.sub(rf"{tmp_path}/home/experiments/opdlm/opdlm_\d+", "SUBMITTED", script)
    # The interpreter may lie in the repository.
    for path, word in ((sys.executable, "PYTHON"), (str(EXAMPLES.parent), "REPOSITORY"), (str(tmp_path), "RUNS")):
        script = script.replace(path, word)
    assert script == (GOLDEN / f"{name}.sh").read_text()


def test_a_dry_run_on_this_machine_prints_the_command(
    prompts: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script("launch.py", "+cluster=local", *prompts, "dry_run=true") == 0
    folder = tmp_path / "log" / "launch"
    command = f"{sys.executable} {EXAMPLES / 'train_opdlm.py'} --config-path={folder} --config-name=config\n"
    assert capsys.readouterr().out == command


@pytest.mark.parametrize("sweep", [(), ("-m", "model.seed=1,2")], ids=["run", "sweep"])
def test_a_machine_without_slurm_is_told_so(
    sweep: tuple[str, ...],
    prompts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", "")
    assert run_script("launch.py", "+cluster=slurm", "cluster.account=research", *prompts, *sweep) == 2
    assert capsys.readouterr().err.endswith(
        "error: sbatch is not on this machine: launch from one of the cluster's, or print with dry_run=true\n"
    )


@pytest.mark.parametrize(
    ("name", "message"), [("my $log", "may not stand in a batch script"), ("nemo_run/log", "may not hold '/nemo_run'")]
)
def test_a_path_that_a_batch_script_would_misread_is_refused(
    name: str, message: str, prompts: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = f"exp_manager.explicit_log_dir='{tmp_path}/{name}'"
    assert run_script("launch.py", "+cluster=slurm", "cluster.account=research", *prompts[:-1], folder) == 2
    assert message in capsys.readouterr().err


@pytest.mark.timeout(200)
def test_a_sweep_trains_each_run_in_a_process_and_folder_of_its_own(tmp_path: Path) -> None:
    settings = dict(item.split("=", 1) for item in (*COMMON, *TINY, *tiny_inputs(tmp_path)))
    command = [
        sys.executable,
        str(EXAMPLES / "train_opdlm.py"),
        "-m",
        *(f"{key}={value}" for key, value in settings.items()),
    ]
    finished = subprocess.run(
        [*command, f"exp_manager.explicit_log_dir={tmp_path}/sweep", "model.opdlm.block_size=choice(2)"],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    (row,) = summary.read(tmp_path / "sweep")
    assert (row.status, row.log_dir) == (summary.FINISHED, tmp_path / "sweep" / "model.opdlm.block_size=2")
    metrics = row.metrics()
    assert metrics["step"] == 2 and all(value is not None for value in metrics.values()), metrics
    assert "finished" in finished.stderr
