"""A rank that fails tells the others why, so that each of them stops with that error instead of waiting for it.

The word goes through the store of the process group. A thread of every rank looks for it: with NCCL a collective operation whose
peer is gone waits on the device, and nothing in the program would notice before the timeout.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from nemo_opdlm.megatron.atomic_folder import OtherRankError

_KEY = "nemo_opdlm/failure"
_POLL_SECONDS = 1.0
#: How long a failed rank stays, so that all have read its word before a store that it hosts goes with it.
_LINGER_SECONDS = 4.0
#: How long a rank that was told may take to end by itself.
_PATIENCE_SECONDS = 30.0


class RankFailure(ConnectionError):
    """Another rank failed; the message says which and why."""


@contextmanager
def shared_failures() -> Iterator[None]:
    """Within this block an error of one rank ends all of them.

    Raises:
        RankFailure: on the other ranks, in place of the error of their broken collective operation. A rank that cannot
            raise, as it waits for a device, prints the message and exits.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    watch = _Watch(_get_default_store())
    try:
        yield
    except Exception as error:
        if not _comes_from_another_rank(error):
            watch.tell(f"rank {dist.get_rank()} failed: {type(error).__name__}: {_first_line(error)}")
            raise
        silent = f"another rank died, or did not come within model.distributed_timeout_minutes: {_first_line(error)}"
        raise RankFailure(watch.told() or silent) from error
    finally:
        watch.stop()


class _Watch:
    """Looks for the word of a failed rank."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store
        self._message: str | None = None
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="nemo_opdlm failures", daemon=True)
        self._thread.start()

    def tell(self, message: str) -> None:
        """Leave word. The first failure is the cause, later ones follow from it."""
        with contextlib.suppress(dist.DistError, RuntimeError):  # the store may be gone with another rank
            self._store.compare_set(_KEY, "", message)
            self._has_ended.wait(_LINGER_SECONDS)

    def told(self) -> str | None:
        """What a failed rank left; None if it said nothing in time."""
        deadline = time.monotonic() + _LINGER_SECONDS
        while self._message is None and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS / 5)
        return self._message

    def stop(self) -> None:
        """Look no longer.

        A process that ends while its thread asks the store would be aborted: Python stops a daemon within torch.
        """
        self._has_ended.set()
        self._thread.join(_LINGER_SECONDS)

    def _look(self) -> None:
        while not self._has_ended.wait(_POLL_SECONDS):
            try:
                if not self._store.check([_KEY]):
                    continue
                self._message = self._store.get(_KEY).decode()
            except (dist.DistError, RuntimeError):
                return  # the store is gone with the rank that hosted it: the connections to that rank break as well
            if not self._has_ended.wait(_PATIENCE_SECONDS):
                sys.stderr.write(f"error: {self._message}\n")
                sys.stderr.flush()
                os._exit(1)
            return


def _comes_from_another_rank(error: BaseException | None) -> bool:
    """Whether it or its cause comes from a collective operation or is another rank's.

    Gloo raises plain RuntimeErrors, NCCL those of `torch.distributed`.
    """
    words = ("gloo", "nccl", "connection closed", "connection reset", "timed out waiting")
    while error is not None:
        is_plain = type(error) is RuntimeError and any(word in str(error).lower() for word in words)
        if is_plain or isinstance(error, dist.DistError | OtherRankError):
            return True
        error = error.__cause__
    return False


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
