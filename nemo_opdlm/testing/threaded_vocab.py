"""A vocabulary cut into shards in one process.

Every shard runs in its own thread with its own autograd graph, as every tensor-parallel rank runs in its own process;
collectives meet at a barrier, in the forward and in the backward pass, and add in shard order.
"""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class Meeting:
    """All-reduce among threads."""

    def __init__(self, num_shards: int) -> None:
        self.slots: list[Tensor] = [torch.empty(0)] * num_shards
        self.barrier = threading.Barrier(num_shards, timeout=10)

    def all_reduce(self, shard: int, x: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``combine`` makes of the tensors of all shards, stacked in shard order."""
        self.slots[shard] = x.detach()
        self.barrier.wait()
        total = combine(torch.stack(self.slots))
        self.barrier.wait()
        return total


class _ReduceForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        return reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _ReduceBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.reduce = reduce
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.reduce(grad), None


def _smallest(x: Tensor) -> float:
    return -torch.inf if x.is_floating_point() else torch.iinfo(x.dtype).min


class ThreadedVocab:
    """One shard of the vocabulary, the others in other threads."""

    def __init__(self, meeting: Meeting, shard: int, width: int) -> None:
        self.meeting, self.shard, self.start = meeting, shard, shard * width

    def _add(self, x: Tensor) -> Tensor:
        return self.meeting.all_reduce(self.shard, x, lambda stack: stack.sum(0))

    def max(self, x: Tensor) -> Tensor:
        """Largest value over all shards, overlooking those that are NaN, as a backend may."""
        return self.meeting.all_reduce(
            self.shard, x.detach().amax(-1), lambda stack: stack.masked_fill(stack != stack, _smallest(stack)).amax(0)
        )

    def sum(self, x: Tensor) -> Tensor:
        """Sum over all shards."""
        total: Tensor = _ReduceForward.apply(x.sum(-1), self._add)
        return total

    def spread(self, x: Tensor) -> Tensor:
        """The value itself; backward is summed over shards."""
        same: Tensor = _ReduceBackward.apply(x, self._add)
        return same

    def take(self, x: Tensor, ids: Tensor) -> Tensor:
        """Values at global ids."""
        column = ids - self.start
        owned = (column >= 0) & (column < x.shape[-1])
        mine = x.gather(-1, column.masked_fill(~owned, 0)).masked_fill(~owned, 0.0)
        taken: Tensor = _ReduceForward.apply(mine, self._add)
        return taken

    def gather(self, x: Tensor) -> Tensor:
        """The lists of all shards in shard order."""
        return self.meeting.all_reduce(self.shard, x, lambda stack: torch.cat(list(stack), -1))


def on_shards(
    num_shards: int, vocab_size: int, body: Callable[[ThreadedVocab, slice], Any], vocab_class: type = ThreadedVocab
) -> list[Any]:
    """``body(vocab, columns)`` of every shard, in shard order; columns is its slice of the vocabulary."""
    width, meeting = vocab_size // num_shards, Meeting(num_shards)

    def run(shard: int) -> Any:
        try:
            return body(vocab_class(meeting, shard, width), slice(shard * width, (shard + 1) * width))
        except BaseException:
            meeting.barrier.abort()  # or the other shards would wait for this one
            raise

    with ThreadPoolExecutor(num_shards) as pool:
        futures = [pool.submit(run, shard) for shard in range(num_shards)]
    causes = [
        e for e in (future.exception() for future in futures) if e and not isinstance(e, threading.BrokenBarrierError)
    ]
    if causes:
        raise causes[0]
    return [future.result() for future in futures]
