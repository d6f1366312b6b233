"""A run that is told to leave saves and asks to be started again; the same command makes it the uninterrupted run."""

import signal
from pathlib import Path

import pytest

from nemo_opdlm.lightning.preemption import EXIT_CODE
from tests.faults.conftest import Scene, assert_same_rows, command, newest_checkpoint
from tests.faults.victims import Strike, Victims
from tests.integration.training_runs import read_metrics

#: When a signal comes: in which phase, before which event of it, and the updates made when the run has left.
MOMENTS = {"rollout": ("r", 17, 2), "update": ("u", 9, 3), "save": ("c", 20, 3)}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_told_to_leave_saves_and_goes_on_bitwise(moment: str, scene: Scene, kills: int, tmp_path: Path) -> None:
    """In a rollout, which is given up, in an update and in a save, which come to their ends."""
    if kills < 2 and (moment, scene.num_ranks) not in (("rollout", 1), ("update", 2)):
        pytest.skip("left to make fault-injection")
    phase, event, steps_done = MOMENTS[moment]
    left = scene.run(tmp_path, strike=Strike(signal.SIGTERM, phase, event, rank=scene.num_ranks - 1))
    assert left.codes == [EXIT_CODE] * scene.num_ranks
    steps = [row["global_step"] for row in read_metrics(tmp_path)]
    assert steps == list(range(1, steps_done + 1)) or moment == "save"
    assert f"step={steps[-1]}" in newest_checkpoint(tmp_path).name
    assert scene.run(tmp_path).codes == [0] * scene.num_ranks
    scene.assert_same_end(tmp_path)


#: Rollouts of several batches in flight between two stages, of ranks that answer different prompts, and of a causal teacher.
OTHERS = {
    "PP2": ("model.pipeline_model_parallel_size=2",),
    "DP2": (),
    "CP2": ("model.context_parallel_size=2",),
    "teacher": ("+experiment=off_policy", "model.pipeline_model_parallel_size=2"),
    "async": ("model.dist_ckpt_async_save=true",),
}


@pytest.mark.usefixtures("thorough")
@pytest.mark.parametrize("layout", OTHERS)
def test_any_layout_leaves_a_rollout_together(
    layout: str, victims: Victims, inputs: tuple[str, ...], tmp_path: Path
) -> None:
    overrides = ("model.tensor_model_parallel_size=1", *OTHERS[layout])

    def run(name: str, strike: Strike | None = None) -> list[int]:
        return victims.run(command(inputs, 2, tmp_path / name, *overrides), 2, strike=strike).codes

    assert run("whole") == [0, 0]
    assert run("left", Strike(signal.SIGTERM, "r", 17, rank=1)) == [EXIT_CODE] * 2
    assert run("left") == [0, 0]
    assert_same_rows(*(read_metrics(tmp_path / name) for name in ("left", "whole")))


def test_the_warning_before_a_slurm_time_limit_has_the_job_queued_again(
    victims: Victims, inputs: tuple[str, ...], tmp_path: Path
) -> None:
    """`sbatch --signal=USR1@...`; the name of the job is passed to a stand-in for `scontrol`."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    job = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "opdlm", "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1"}
    job |= {"SLURM_NODELIST": "127.0.0.1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    environment = {**job, "PATH": f"{scontrol.parent}:/usr/bin:/bin"}
    strike = Strike(signal.SIGUSR1, "u", 9)
    left = victims.run(command(inputs, 1, tmp_path / "log"), strike=strike, environment=environment)
    assert left.codes == [EXIT_CODE], left.outputs[0][-3000:]
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    assert "step=3" in newest_checkpoint(tmp_path / "log").name


@pytest.mark.usefixtures("thorough")
def test_a_run_out_of_time_stops_after_a_step_and_the_same_command_goes_on(
    victims: Victims, inputs: tuple[str, ...], tmp_path: Path
) -> None:
    def run(name: str, *overrides: str) -> list[int]:
        return victims.run(command(inputs, 2, tmp_path / name, "trainer.max_steps=16", *overrides), 2).codes

    assert run("whole") == [0, 0]
    expected, steps = read_metrics(tmp_path / "whole"), [0]
    while steps[-1] < 16:
        assert run("parts", "exp_manager.max_time_per_run=00:00:00:01") == [0, 0]
        steps.append(read_metrics(tmp_path / "parts")[-1]["global_step"])
        assert f"step={steps[-1]}" in newest_checkpoint(tmp_path / "parts").name and steps[-1] > steps[-2]
    assert len(steps) > 2, "the first run had time for all of it"
    assert_same_rows(read_metrics(tmp_path / "parts"), expected)
