"""The training script under torchrun, in a Slurm job and by itself gives one process's metrics; any layout resumes it."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_opdlm.models.conversion import open_model
from nemo_opdlm.testing.metrics import is_measured
from tests.integration.training_runs import EXAMPLES, read_metrics, run

PROMPTS = EXAMPLES / "prompts"
SETTINGS = (
    "+experiment=quickstart",
    f"model.data.train_ds.file_path={PROMPTS / 'passages_train.jsonl'}",
    f"model.data.validation_ds.file_path={PROMPTS / 'passages_heldout.jsonl'}",
    "model.data.validation_ds.num_samples=6",
    "model.data.validation_ds.response_length=8",
    "model.data.train_ds.truncate_prompt_to=10",
    "model.opdlm.rollout.num_prompts_per_step=16",
    "model.opdlm.rollout.max_new_tokens=8",
    "model.global_batch_size=8",
    "model.micro_batch_size=2",
    "model.optim.sched.warmup_steps=2",
    "trainer.val_check_interval=2",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
    "exp_manager.seconds_to_sleep=0",
)


def same_metrics(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [row["global_step"] for row in found] == [row["global_step"] for row in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if not is_measured(key):
                # How far training and rollout lie apart is nothing but rounding, which layouts do change.
                tolerance = 1e-4 if "logprob_gap" in key else 1e-6
                assert ours[key] == pytest.approx(value, rel=1e-4, abs=tolerance), (ours["global_step"], key)


@pytest.fixture(scope="module")
def one_process(glassllm: str, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Metrics of four updates of one process."""
    log_dir = tmp_path_factory.mktemp("one")
    run(log_dir, *SETTINGS, f"model.restore_from_path={glassllm}", "trainer.max_steps=4")
    return read_metrics(log_dir)


def environment(**changes: str) -> dict[str, str]:
    """Of a launched process: without what an earlier launch in this process has left."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")}
    return {**inherited, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **changes}


@pytest.mark.timeout(400)
def test_torchrun_on_four_ranks_gives_one_processs_metrics_and_one_process_goes_on(
    glassllm: str, one_process: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Three updates at TP2 x PP2, the last one in the middle of a rollout batch; one process makes the fourth.

    The four ranks save in the background, and leave an archive that one process reads.
    """
    settings = (*SETTINGS, f"model.restore_from_path={glassllm}", f"exp_manager.explicit_log_dir={tmp_path}")
    layout = (
        "trainer.devices=4",
        "model.tensor_model_parallel_size=2",
        "model.pipeline_model_parallel_size=2",
        "model.dist_ckpt_async_save=true",
        "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true",
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    finished = subprocess.run(
        [*command, str(EXAMPLES / "train_opdlm.py"), *settings, *layout, "trainer.max_steps=3"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=350,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    same_metrics(read_metrics(tmp_path), one_process[:3])
    resumed = run(tmp_path, *settings, "trainer.max_steps=3")
    (archive,) = (tmp_path / "checkpoints").glob("*.nemo")
    with open_model(archive) as (network, _):
        for name, tensor in network.named_parameters():
            assert torch.equal(tensor, resumed.model.get_parameter(name)), name
    run(tmp_path, *settings, "trainer.max_steps=4")
    same_metrics(read_metrics(tmp_path), one_process)


@pytest.mark.timeout(300)
def test_without_a_launcher_the_script_starts_its_processes_itself(
    glassllm: str, one_process: list[dict[str, Any]], tmp_path: Path
) -> None:
    settings = (*SETTINGS, f"model.restore_from_path={glassllm}", f"exp_manager.explicit_log_dir={tmp_path}")
    layout = ("trainer.devices=2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true")
    finished = subprocess.run(
        [sys.executable, str(EXAMPLES / "train_opdlm.py"), *settings, *layout, "trainer.max_steps=2"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    same_metrics(read_metrics(tmp_path), one_process[:2])


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port that nobody else is given meanwhile, and that a server with SO_REUSEADDR, as torch's store is, may listen at."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@pytest.mark.timeout(300)
def test_a_slurm_job_of_two_tasks_is_one_run(glassllm: str, one_process: list[dict[str, Any]], tmp_path: Path) -> None:
    """Two processes with the variables that srun gives its tasks, validation and checkpoints included."""
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "opdlm",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
    }
    command = [
        sys.executable,
        str(EXAMPLES / "train_opdlm.py"),
        *SETTINGS,
        f"model.restore_from_path={glassllm}",
        f"exp_manager.explicit_log_dir={tmp_path}",
        "trainer.devices=2",
        "trainer.max_steps=2",
    ]
    with reserved_port() as port:
        tasks = [
            subprocess.Popen(
                command,
                env=environment(**job, MASTER_PORT=str(port), SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        try:
            errors = [task.communicate(timeout=250)[1] for task in tasks]
        finally:
            for task in tasks:
                task.kill()
    assert [task.returncode for task in tasks] == [0, 0], errors
    same_metrics(read_metrics(tmp_path), one_process[:2])
