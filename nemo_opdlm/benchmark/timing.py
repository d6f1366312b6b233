"""Timing of work that a GPU does while the host goes on."""

import time
from collections.abc import Callable

import torch

#: A baseline that spends less of its time in the network than this is no measure of anything.
LEAST_MODEL_SHARE = 0.85


def wait(device: torch.device) -> None:
    """Let what was asked of a GPU be done, so that it is timed where it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def best_seconds(run: Callable[[], object], device: torch.device, repeats: int = 6) -> float:
    """The shortest of some runs."""
    best = float("inf")
    for _ in range(repeats):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        best = min(best, time.perf_counter() - start)
    return best
