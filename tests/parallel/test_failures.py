"""A rank that fails or dies ends the others, with its error and within the timeout."""

import os
import signal
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist

from nemo_opdlm.megatron.failure import RankFailure, shared_failures
from tests import forked

TIMEOUT = timedelta(seconds=20)


def join(rank: int, folder: str) -> None:
    """Meet over a store that the first rank hosts, as without torchrun; it goes when that rank goes."""
    told = Path(folder) / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        told.with_suffix(".new").write_text(str(store.port))
        told.with_suffix(".new").rename(told)
    else:
        while not told.exists():
            time.sleep(0.05)
        store = dist.TCPStore("127.0.0.1", int(told.read_text()), 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=TIMEOUT)


def work(rank: int, folder: str, culprit: int, how: str, connection: Connection) -> None:
    join(rank, folder)
    dist.barrier()
    start = time.monotonic()
    try:
        with shared_failures():
            if rank == culprit and how == "raises":
                raise ValueError("row 7 of prompts.jsonl is no prompt")
            if rank == culprit and how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "raises while the other works":
                if rank == culprit:
                    raise ValueError("row 7 of prompts.jsonl is no prompt")
                time.sleep(6)  # longer than a failed rank stays
            dist.barrier()
    except Exception as error:
        connection.send((type(error).__name__, str(error), time.monotonic() - start))


def outcomes_of(culprit: int, how: str, tmp_path: Path) -> list[tuple[str, str, float] | None]:
    """What each rank ended with: kind of error, its text, seconds; None from one that said nothing."""
    context = forked.server()
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=work, args=(rank, str(tmp_path), culprit, how, theirs))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert not any(process.is_alive() for process in processes)
    return [ours.recv() if ours.poll() else None for ours, _ in pipes]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("how", ["raises", "raises while the other works"])
def test_the_error_of_one_rank_is_the_error_of_all(how: str, culprit: int, tmp_path: Path) -> None:
    outcomes = outcomes_of(culprit, how, tmp_path)
    failed, other = outcomes[culprit], outcomes[1 - culprit]
    assert failed is not None and other is not None
    assert failed[:2] == ("ValueError", "row 7 of prompts.jsonl is no prompt")
    assert other[0] == RankFailure.__name__
    assert other[1] == f"rank {culprit} failed: ValueError: row 7 of prompts.jsonl is no prompt"
    assert other[2] < TIMEOUT.total_seconds()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_that_is_killed_does_not_leave_the_others_waiting(culprit: int, tmp_path: Path) -> None:
    outcomes = outcomes_of(culprit, "dies", tmp_path)
    failed, other = outcomes[culprit], outcomes[1 - culprit]
    assert failed is None and other is not None
    assert other[0] == RankFailure.__name__ and "died" in other[1]
    assert other[2] < TIMEOUT.total_seconds() + 10
