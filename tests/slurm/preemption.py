"""Training jobs that examples/launch.py submits to a real Slurm: preempted, killed, out of time, and resumed exactly.

    make slurm-test          # as root on Debian or Ubuntu; some minutes

Writes what it did to tests/slurm/TRANSCRIPT.md. Each run has two tasks (TP2) on the CPU.
"""

import json
import re
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nemo_opdlm.testing.metrics import without_measured
from tests.slurm.cluster import install, slurm

ROOT = Path(__file__).resolve().parents[2]
TRANSCRIPT = Path(__file__).with_name("TRANSCRIPT.md")
MAX_STEPS = 30
SETTINGS = (
    "+experiment=quickstart",
    "trainer.devices=2",
    "model.tensor_model_parallel_size=2",
    f"trainer.max_steps={MAX_STEPS}",
    "trainer.val_check_interval=4",
    "trainer.enable_progress_bar=false",
    "model.data.train_ds.file_path=examples/prompts/passages_train.jsonl",
    "model.data.validation_ds.num_samples=4",
    "model.data.validation_ds.response_length=8",
    "model.opdlm.rollout.num_prompts_per_step=64",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
)
CLUSTER = (
    "+cluster=slurm",
    "cluster.account=research",
    "cluster.partition=patient",
    "run.time_limit=00:30:00",
    "++cluster.env_vars.OMP_NUM_THREADS=1",
)


class Session:
    """Commands at the cluster, written down as they go.

    Args:
        environment: of every command.
        hidden: text to leave out of the transcript -> what stands in its place.
    """

    def __init__(self, environment: dict[str, str], hidden: dict[str, str]) -> None:
        self._environment, self._hidden = environment, hidden
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        """Write down what follows."""
        self.lines += ["", text, ""]
        print(text, flush=True)

    def call(self, *command: str, show: bool = True, shown_output: str | None = None) -> str:
        """Call a command that must succeed; returns its output."""
        finished = subprocess.run(
            command,
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
        output = finished.stdout + finished.stderr
        assert finished.returncode == 0, f"{shlex.join(command)}: {output}"
        if show:
            self.show(f"$ {shlex.join(command)}\n{output if shown_output is None else shown_output}")
        return output.strip()

    def show(self, text: str) -> None:
        """Write down output."""
        for hidden, word in self._hidden.items():
            text = re.sub(rf"(?<!\w){re.escape(hidden)}(?!\w)", word, text)
        self.lines += ["```", text.strip(), "```"]
        print(text.strip(), flush=True)

    def wait(self, what: str, is_there: Callable[[], bool], seconds: float = 600) -> None:
        """Wait until something is there."""
        deadline = time.monotonic() + seconds
        while not is_there():
            assert time.monotonic() < deadline, f"{what} did not come within {seconds:.0f} s"
            time.sleep(0.3)


class Training:
    """A training job.

    Args:
        session: to submit it in.
        log_dir: its log folder.
        overrides: keys beside the common ones.
    """

    def __init__(self, session: Session, log_dir: Path, archive: Path, *overrides: str) -> None:
        self._session, self.log_dir = session, log_dir
        self._command = (
            sys.executable,
            "examples/launch.py",
            *CLUSTER,
            *SETTINGS,
            f"model.restore_from_path={archive}",
            f"run.name={log_dir.name}",
            f"exp_manager.explicit_log_dir={log_dir}",
            *overrides,
        )
        self.job_id = 0

    def submit(self) -> None:
        """Submit the job, or its chain, and note the last job's number."""
        found = re.search(r"job (\d+)", self._session.call(*self._command))
        assert found is not None
        self.job_id = int(found[1])

    def script(self) -> str:
        """The batch script."""
        return self._session.call(*self._command, "dry_run=true", show=False)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        file = self.log_dir / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has done so many steps."""
        self._session.wait(f"step {step}", lambda: bool(self.rows) and self.rows[-1]["global_step"] >= step)

    def state(self, job_id: int) -> str:
        """Slurm's words for a job: state, restarts, exit code."""
        shown = self._session.call("scontrol", "show", "job", str(job_id), show=False)
        return " ".join(re.findall(r"(?:JobState|Reason|Restarts|ExitCode|RunTime)=\S+", shown))

    def restart_now(self, job_id: int) -> None:
        """Spare the two minutes that Slurm lets a job rest that was queued again."""
        self._session.wait("the job's return to the queue", lambda: "JobState=PENDING" in self.state(job_id))
        self._session.show(f"job {job_id}: {self.state(job_id)}")
        # Within these minutes what the job has left running ends; started before, it fails.
        self._session.wait("a free node", self._is_node_free)
        self._session.call("scontrol", "update", f"JobId={job_id}", "StartTime=now", show=False)

    def _is_node_free(self) -> bool:
        return set(self._session.call("sinfo", "--noheader", "--format=%T", show=False).split()) == {"idle"}

    def wait_until_done(self, job_id: int) -> None:
        """Wait until a job has left the queue with success."""
        self._session.wait(
            "the end of the job", lambda: re.search("COMPLETED|FAILED|CANCEL", self.state(job_id)) is not None
        )
        self._session.show(f"job {job_id}: {self.state(job_id)}\nmetrics.jsonl: {len(self.rows)} steps")
        assert "JobState=COMPLETED" in self.state(job_id), self._output()

    def _output(self) -> str:
        return "\n".join(file.read_text()[-3000:] for file in sorted((self.log_dir / "launch").glob("*.out")))


def same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Whether two runs are the same but for what is measured."""
    assert [row["global_step"] for row in found] == list(range(1, len(expected) + 1)), found
    for ours, theirs in zip(without_measured(found), without_measured(expected), strict=True):
        different = [key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)]
        assert not different, f"step {theirs['global_step']}: {different}"


def preempt_and_kill(session: Session, run: Training, whole: list[dict[str, Any]]) -> None:
    """An urgent job takes the node; later a task is killed: each time the job is queued again and resumes."""
    session.say("## Preempted, then killed\n\nThe same run. After three steps an urgent job takes the node.")
    run.submit()
    run.wait_for_step(3)
    session.call("sbatch", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    run.restart_now(run.job_id)
    done = len(run.rows)
    session.say(f"It had done {done} steps. Started again, it goes on; after step {done + 3} its tasks are killed.")
    run.wait_for_step(done + 3)
    session.show(f"job {run.job_id}: {run.state(run.job_id)}")
    steps = session.call("squeue", "--steps", f"--jobs={run.job_id}", "--noheader", "--format=%i %j", show=False)
    (step,) = [line.split()[0] for line in steps.splitlines() if line.split()[1].startswith("python")]
    session.call("scancel", "--signal=KILL", step)
    run.restart_now(run.job_id)
    run.wait_until_done(run.job_id)
    same(run.rows, whole)
    session.say("Every number of metrics.jsonl but the times equals the uninterrupted run's.")


def chain(session: Session, run: Training, whole: list[dict[str, Any]]) -> None:
    """Two jobs of one name: the first stops at `max_time_per_run`, the second goes on where it stopped."""
    session.say("## Out of time\n\nA chain of two jobs that may train for some seconds each.")
    run.submit()
    session.wait("the first job", lambda: "RUNNING" in run.state(run.job_id - 1))
    session.call("squeue", "--format=%i %j %T %r")
    run.wait_until_done(run.job_id - 1)
    done = len(run.rows)
    run.wait_until_done(run.job_id)
    assert 0 < done < len(run.rows)
    same(run.rows, whole[: len(run.rows)])
    session.say(f"The second job began after step {done}; the numbers are the uninterrupted run's.")


def main() -> None:
    """Install, start, submit, interrupt, compare, write down."""
    install()
    from nemo_opdlm.convert import sources
    from nemo_opdlm.models.conversion import convert_hf_to_nemo

    with tempfile.TemporaryDirectory(prefix="slurm-test-") as temporary:
        folder = Path(temporary)
        archive = folder / "glassllm.nemo"
        convert_hf_to_nemo(sources.fetch("glassllm"), archive)
        with slurm(folder / "slurm", cpus=2) as environment:
            settings = shlex.join([*CLUSTER, *SETTINGS, f"model.restore_from_path={archive}"])
            hidden = {settings: "$SETTINGS", str(folder): "RUNS", str(ROOT): "REPOSITORY", sys.executable: "python"}
            session = Session(
                {**environment, "NEMORUN_HOME": str(folder / "submitted")}, hidden | {socket.gethostname(): "node"}
            )
            version = session.call("sinfo", "--version", show=False)
            whole = Training(session, folder / "whole", archive)
            session.show(
                "SETTINGS='" + " ".join([*CLUSTER, *SETTINGS, "model.restore_from_path=RUNS/glassllm.nemo"]) + "'"
            )
            session.say("## The batch script")
            session.show(whole.script())
            session.say("## Uninterrupted")
            whole.submit()
            whole.wait_until_done(whole.job_id)
            preempt_and_kill(session, Training(session, folder / "interrupted", archive), whole.rows)
            limited = ("run.chain=2", "exp_manager.max_time_per_run=00:00:00:08")
            chain(session, Training(session, folder / "chain", archive, *limited), whole.rows)
    title = f"# Training on a real Slurm\n\nWritten by `make slurm-test`, with {version} on one node of two CPUs."
    TRANSCRIPT.write_text("\n".join([title, *session.lines]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
