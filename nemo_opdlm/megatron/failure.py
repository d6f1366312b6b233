"""A rank that fails tells the others why, so that each of them stops with that error instead of its own broken connection."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

_KEY = "nemo_opdlm/failure"
#: How long a rank whose connection broke waits for the word of the one that failed.
_PATIENCE = timedelta(seconds=5)


class RankFailure(ConnectionError):
    """Another rank failed; the message says which and why."""


@contextmanager
def shared_failures() -> Iterator[None]:
    """Within this block an error of one rank stops all: they wait for it in a collective operation, which breaks or times out.

    Raises:
        RankFailure: on the other ranks, in place of the error of that operation.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        if not _is_of_communication(error):
            _tell(f"rank {dist.get_rank()} failed: {type(error).__name__}: {_first_line(error)}")
            raise
        silent = f"another rank died, or did not come within model.distributed_timeout_minutes: {_first_line(error)}"
        raise RankFailure(_told() or silent) from error


def _is_of_communication(error: Exception) -> bool:
    """Whether it comes from a collective operation. Gloo raises plain RuntimeErrors, NCCL those of `torch.distributed`."""
    words = ("gloo", "nccl", "connection closed", "connection reset", "timed out waiting")
    is_plain = type(error) is RuntimeError and any(word in str(error).lower() for word in words)
    return is_plain or isinstance(error, dist.DistError)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")


def _tell(message: str) -> None:
    # The first failure is the cause, later ones follow from it.
    _get_default_store().compare_set(_KEY, "", message)


def _told() -> str | None:
    """What the failed rank left; None if it said nothing."""
    store, deadline = _get_default_store(), time.monotonic() + _PATIENCE.total_seconds()
    while time.monotonic() < deadline:
        if store.check([_KEY]):
            return store.get(_KEY).decode()
        time.sleep(0.1)
    return None
