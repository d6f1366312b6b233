"""Megatron's queue of asynchronous saves, with a thread as its worker.

Megatron brings two workers, and neither runs here. One forks the training process: a child of a process with threads
(NCCL's or Gloo's, OpenMP's, autograd's) can inherit a lock that nobody will release. The other spawns a process that
imports the running script again (unguarded scripts and notebooks fail), asks for a GPU by number (on CPU a division by
zero) and gets the tensors through shared memory, 64 MB in a plain container. Both outlive a killed trainer and would go
on writing into a folder that the restarted run clears up; a thread ends with its process.

What is left to a thread holds no lock for long: torch copies and writes tensors without the GIL. It calls neither CUDA
nor NCCL: tensors were copied to the host before, and ranks agree on the training thread, where the queue is polled.
"""

import threading
from collections.abc import Callable

from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCaller, AsyncCallsQueue, AsyncRequest


class ThreadedCallsQueue(AsyncCallsQueue):
    """Megatron's queue: a save is finalised, in order and on every rank, once all ranks have written their files."""

    def schedule(self, write: Callable[[], None], *finalize: Callable[[], None]) -> None:
        """Start `write` on a thread; every rank calls this.

        Args:
            write: must not raise and must not talk to other ranks.
            finalize: called one after the other by `maybe_finalize_async_calls`, on the thread that calls it.
        """
        self.schedule_async_request(AsyncRequest(write, (), list(finalize)))

    def _get_async_caller(self) -> AsyncCaller:
        return _ThreadCaller()


class _ThreadCaller(AsyncCaller):
    """The worker of one save."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def schedule_async_call(self, async_req: AsyncRequest) -> None:
        # No daemon: at exit Python would stop it within torch, which aborts the process.
        self._thread = threading.Thread(target=async_req.async_fn, args=async_req.async_fn_args, name="checkpoint")
        self._thread.start()

    def is_current_async_call_done(self, blocking: bool = False, no_dist: bool = False) -> bool:
        assert self._thread is not None
        if blocking:
            self._thread.join()
        is_alive = self._thread.is_alive()
        return not is_alive if no_dist else bool(self.sync_all_async_calls(int(is_alive)))

    def close(self, abort: bool = False) -> None:
        if self._thread is not None:
            self._thread.join()

    def __del__(self) -> None:
        """Nothing to end; Megatron's base class wants one."""
