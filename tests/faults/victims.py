"""Runs of the training script in processes of their own, struck by a signal at a chosen moment.

Each rank is forked with everything imported, so that a run of six updates takes two seconds. What a run does is noted as a
row of letters, an event each; a rank can be told to send itself a signal before event number n.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from tests import forked

#: What an event belongs to.
PHASES = {"s": "start-up", "r": "rollout", "t": "teacher", "u": "update", "m": "metrics", "c": "checkpoint"}
#: Longest a rank may wait for another.
TIMEOUT_SECONDS = 60
_SHARED = ("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Strike:
    """A signal that a rank sends itself.

    Attributes:
        signal: its number.
        phase: letter of the phase that counts; None = all of them.
        event: before which event of that phase, from 0.
        rank: which rank.
    """

    signal: int
    phase: str | None
    event: int
    rank: int = 0


@dataclass
class Outcome:
    """How a run ended.

    Attributes:
        codes: exit code of each rank, negative for a signal.
        events: letters of what each rank did.
        outputs: what each rank wrote to the terminal.
        seconds: how long it took.
    """

    codes: list[int]
    events: list[str]
    outputs: list[str]
    seconds: float

    def errors(self, rank: int) -> list[str]:
        """The lines that a rank's user is told."""
        return [line for line in self.outputs[rank].splitlines() if line.startswith("error: ")]


@dataclass
class Victims:
    """Starts runs.

    Args:
        folder: for their traces and outputs.
    """

    folder: Path
    _count: int = 0
    _context: Any = field(default_factory=forked.server)

    def run(
        self,
        arguments: Sequence[str],
        num_ranks: int = 1,
        strike: Strike | None = None,
        kill_after_s: float | None = None,
        alone: bool = False,
        environment: dict[str, str] | None = None,
        limit_s: float = 200,
    ) -> Outcome:
        """Run the training script to its end.

        Args:
            arguments: of the script.
            num_ranks: processes.
            strike: a signal to one of them.
            kill_after_s: kill all of them after so many seconds.
            alone: a rank that is killed dies alone; else the others are killed with it.
            environment: further variables.
            limit_s: a run that takes longer hangs.
        """
        self._count += 1
        place, start = self.folder / f"run{self._count}", time.monotonic()
        place.mkdir()
        ranks = [
            self._context.Process(
                target=_rank, args=(rank, num_ranks, str(place), list(arguments), strike, environment or {})
            )
            for rank in range(num_ranks)
        ]
        for rank in ranks:
            rank.start()
        self._wait(ranks, kill_after_s, alone, limit_s)
        read = [[(place / f"{name}{rank}").read_text() for rank in range(num_ranks)] for name in ("events", "output")]
        return Outcome([rank.exitcode for rank in ranks], *read, time.monotonic() - start)

    def _wait(self, ranks: list[Any], kill_after_s: float | None, alone: bool, limit_s: float) -> None:
        start, waiting = time.monotonic(), list(ranks)
        try:
            while waiting:
                limit = limit_s if kill_after_s is None else kill_after_s
                ended = wait([rank.sentinel for rank in waiting], timeout=max(0.0, start + limit - time.monotonic()))
                for rank in waiting:
                    if rank.sentinel in ended:
                        rank.join()
                waiting = [rank for rank in waiting if rank.exitcode is None]
                is_struck = any(rank.exitcode == -signal.SIGKILL for rank in ranks) and not alone
                if (not ended and kill_after_s is not None) or is_struck:
                    for rank in waiting:
                        rank.kill()
                    kill_after_s = None
                else:
                    assert ended, f"a rank did not come back within {limit_s} s"
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()


def _rank(
    rank: int, num_ranks: int, place: str, arguments: list[str], strike: Strike | None, environment: dict[str, str]
) -> None:
    """The training script as one rank of a torchrun that meets over a file store."""
    import torch
    import torch.distributed as dist

    output = os.open(f"{place}/output{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    os.environ |= environment
    _note_events(f"{place}/events{rank}", strike if strike is not None and strike.rank == rank else None, arguments)
    if num_ranks > 1:
        os.environ |= {**dict.fromkeys(_SHARED, str(num_ranks)), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        os.environ |= {"GROUP_RANK": "0", "MASTER_ADDR": "none", "MASTER_PORT": "0"}
        store = dist.FileStore(f"{place}/store", num_ranks)
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    from tests.integration.training_runs import run_script

    code = run_script("train_opdlm.py", *arguments)
    sys.stdout.flush()
    # As from a script: threads of Gloo do not outlive it.
    sys.exit(code if isinstance(code, int) else 1)


def _note_events(path: str, strike: Strike | None, arguments: list[str]) -> None:
    """Write a letter for every event, and strike when it is time."""
    stream, counts = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), dict.fromkeys((*PHASES, None), 0)
    pid = os.getpid()

    def note(letter: str) -> None:
        if os.getpid() != pid:
            return
        if strike is not None and strike.phase in (letter, None) and counts[strike.phase] == strike.event:
            counts[strike.phase] += 1
            os.kill(pid, strike.signal)
        os.write(stream, letter.encode())
        counts[letter] += 1
        counts[None] += 1

    (log_dir,) = (item.partition("=")[2] for item in arguments if item.startswith("exp_manager.explicit_log_dir="))
    is_training = _note_calls(note)

    def audit(event: str, found: tuple[Any, ...]) -> None:
        is_change = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")
        is_write = event == "open" and isinstance(found[2], int) and found[2] & (os.O_WRONLY | os.O_RDWR)
        if (is_change or is_write) and isinstance(found[0], str | os.PathLike) and log_dir in str(found[0]):
            note("c" if f"{log_dir}/checkpoints" in str(found[0]) and is_training() else "m" if is_training() else "s")

    sys.addaudithook(audit)


def _note_calls(note: Callable[[str], None]) -> Callable[[], bool]:
    """Note forwards of rollouts, teacher passes, parts of updates, rows of metrics and files that reach the disk."""
    from nemo_opdlm.lightning.step_lines import StepLines
    from nemo_opdlm.models.distiller import OnPolicyDistiller
    from nemo_opdlm.models.opdlm_model import OPDLMModel

    has_begun = [False]

    def before(owner: Any, name: str, letter: str) -> None:
        function = getattr(owner, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            has_begun[0] = True
            note(letter)
            return function(*args, **kwargs)

        setattr(owner, name, noted)

    before(OPDLMModel, "training_step", "u")
    before(OPDLMModel, "_tell_progress", "r")
    before(OnPolicyDistiller, "share_out", "t")
    for name in ("accumulate_gradients", "take_step", "check_progress"):
        before(OnPolicyDistiller, name, "u")
    before(StepLines, "_write_last", "m")
    before(os, "fsync", "c")
    return lambda: has_begun[0]
