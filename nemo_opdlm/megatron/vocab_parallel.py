"""The vocabulary of tensor-parallel ranks: the collectives behind `VocabReducer`, in the forward and backward pass."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor


class _SummedGradient(torch.autograd.Function):
    """Identity forward, all-reduce backward.

    Megatron's `copy_to_tensor_model_parallel_region` reduces the incoming gradient in place, although autograd may
    have handed the same tensor to another branch, and returns it unreduced where it is not contiguous.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class TensorParallelVocab:
    """A `VocabReducer` over the ranks of a tensor-parallel group, whose ranks hold equally many columns in rank order.

    Args:
        group: the tensor-parallel group.
        width: columns of each rank, vocabulary padding included.
    """

    def __init__(self, group: dist.ProcessGroup, width: int) -> None:
        self.group = group
        self.shard = dist.get_rank(group)
        self.start = self.shard * width

    def max(self, x: Tensor) -> Tensor:
        """Largest value over all ranks' last dimensions, without gradient; a NaN on another rank may go unseen."""
        largest = x.detach().amax(-1).contiguous()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return largest

    def sum(self, x: Tensor) -> Tensor:
        """Sum over all ranks' last dimensions; backward is the identity on every rank."""
        return self._add(x.sum(-1))

    def spread(self, x: Tensor) -> Tensor:
        """The value itself; backward is summed over ranks."""
        same: Tensor = _SummedGradient.apply(x, self.group)
        return same

    def take(self, x: Tensor, ids: Tensor) -> Tensor:
        """Values at global ``ids [..., K]``; the gradient reaches their owner only."""
        column = ids - self.start
        is_foreign = (column < 0) | (column >= x.shape[-1])
        # Filled, not multiplied: whatever stands in the column read in place of a foreign one may be NaN or infinite.
        mine = x.gather(-1, column.masked_fill(is_foreign, 0)).masked_fill(is_foreign, 0.0)
        return self._add(mine)

    def gather(self, x: Tensor) -> Tensor:
        """Short lists ``[..., K]`` of all ranks in rank order, ``[..., num_ranks * K]``, without gradient."""
        mine = x.detach().contiguous()
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, mine, group=self.group)
        return torch.cat(parts, -1)

    def _add(self, x: Tensor) -> Tensor:
        # Megatron reduces `x.contiguous()` and returns x: of any other x it would return the share of this rank.
        total: Tensor = reduce_from_tensor_model_parallel_region(x.contiguous(), group=self.group)
        return total
