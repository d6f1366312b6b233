"""Real processes for tests of parallel code: started once, talking over Gloo and a file store, given one function at a time."""

import gc
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

#: Start-up imports torch and Megatron in every process.
_START_SECONDS = 180


class RankError(AssertionError):
    """A rank raised, died or took too long; the message holds what each of them said."""


class Ranks:
    """A number of processes that wait for functions to run; a context manager.

    Args:
        size: how many.
        timeout_s: after which a collective operation fails, and a function counts as hanging.
    """

    def __init__(self, size: int, timeout_s: float = 300) -> None:
        self.size = size
        self.timeout_s = timeout_s
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """``function(*args)`` on every rank, and what each of them returned.

        The function is found by its module's name, so it has to be importable. After a failure the processes are
        replaced: their collective operations no longer match.

        Raises:
            RankError: a rank raised, died or did not come back in time.
        """
        if not self._processes:
            self._start()
        for connection in self._connections:
            connection.send((function, args))
        try:
            outcomes = self._collect(time.monotonic() + self.timeout_s)
        except RankError:
            self.close()
            raise
        return outcomes

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections = [], []

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        store = Path(tempfile.mkdtemp(prefix="nemo_opdlm_ranks_")) / "store"
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.size, str(store), self.timeout_s, theirs)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._processes.append(process)
            self._connections.append(ours)
        self._collect(time.monotonic() + _START_SECONDS)

    def _collect(self, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        while len(results) + len(errors) < self.size:
            waiting = {
                c: rank for rank, c in enumerate(self._connections) if rank not in results and rank not in errors
            }
            # Once a rank has failed, the others only end at the timeout of their next collective operation.
            ready = wait(list(waiting), timeout=0 if errors else max(0.0, deadline - time.monotonic()))
            if not ready:
                errors |= {rank: errors.get(rank, "did not come back") for rank in waiting.values()}
            for connection, rank in waiting.items():
                if connection not in ready:
                    continue
                try:
                    result, error = connection.recv()
                except EOFError:
                    result, error = None, "died"
                if error is None:
                    results[rank] = result
                else:
                    errors[rank] = error
        if errors:
            raise RankError("\n".join(f"rank {rank}: {errors[rank]}" for rank in sorted(errors)))
        return [results[rank] for rank in range(self.size)]


def _serve(rank: int, size: int, store: str, timeout_s: float, connection: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=timedelta(seconds=timeout_s)
    )
    connection.send((None, None))
    function, args = connection.recv()
    # What the function's module has imported stays: a collection between two layouts need not look at it.
    gc.freeze()
    while True:
        try:
            connection.send((function(*args), None))
        except BaseException:
            connection.send((None, traceback.format_exc()))
        function, args = connection.recv()
