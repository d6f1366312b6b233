"""The parts of an update, timed and told."""

import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager

import torch


class Phases:
    """Puts `time/<phase>_s` into an update's metrics, and tells a listener which phase begins.

    A phase on a GPU ends when the work that it launched has ended: it waits once, for its own stream, so that what other
    streams do meanwhile (gathering parameters, copying checkpoints) goes on. Rollout and student have read their results by
    then and wait for nothing; nothing inside a phase waits for the clock.

    Args:
        device: where the work is done.
        on_phase: the listener.
    """

    def __init__(self, device: torch.device, on_phase: Callable[[str], None] | None = None) -> None:
        self.device = device
        self.on_phase = on_phase

    @contextmanager
    def timed(self, name: str, metrics: MutableMapping[str, float]) -> Iterator[None]:
        """Enter a phase."""
        if self.on_phase is not None:
            self.on_phase(name)
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        metrics[f"time/{name}_s"] = time.perf_counter() - start
