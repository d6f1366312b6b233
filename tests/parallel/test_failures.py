"""A rank that fails or dies ends the others, with its error and within the timeout."""

import os
import signal
import time
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing as mp

from nemo_opdlm.megatron.failure import RankFailure, shared_failures

TIMEOUT = timedelta(seconds=20)


def work(rank: int, store: str, how: str, connection: Connection) -> None:
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2, timeout=TIMEOUT)
    dist.barrier()
    start = time.monotonic()
    try:
        with shared_failures():
            if rank == 1 and how == "raises":
                raise ValueError("row 7 of prompts.jsonl is no prompt")
            if rank == 1 and how == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            dist.barrier()
    except Exception as error:
        connection.send((type(error).__name__, str(error), time.monotonic() - start))


def outcomes_of(how: str, tmp_path: Path) -> list[tuple[str, str, float] | None]:
    """What each rank ended with: kind of error, its text, seconds; None from one that said nothing."""
    context = mp.get_context("spawn")
    pipes = [context.Pipe() for _ in range(2)]
    processes = [
        context.Process(target=work, args=(rank, str(tmp_path / "store"), how, theirs))
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    assert not any(process.is_alive() for process in processes)
    return [ours.recv() if ours.poll() else None for ours, _ in pipes]


@pytest.mark.timeout(120)
def test_the_error_of_one_rank_is_the_error_of_all(tmp_path: Path) -> None:
    first, second = outcomes_of("raises", tmp_path)
    assert first is not None and second is not None
    assert second[:2] == ("ValueError", "row 7 of prompts.jsonl is no prompt")
    assert first[0] == RankFailure.__name__
    assert first[1] == "rank 1 failed: ValueError: row 7 of prompts.jsonl is no prompt"
    assert first[2] < TIMEOUT.total_seconds()


@pytest.mark.timeout(120)
def test_a_rank_that_is_killed_does_not_leave_the_others_waiting(tmp_path: Path) -> None:
    first, second = outcomes_of("dies", tmp_path)
    assert second is None and first is not None
    assert first[0] == RankFailure.__name__ and "died" in first[1]
    assert first[2] < TIMEOUT.total_seconds() + 10
