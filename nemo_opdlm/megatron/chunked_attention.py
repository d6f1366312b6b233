"""Attention of long rows: chunk by chunk of their queries, with keys and values gathered over context-parallel ranks.

Neither the mask of a whole row nor the gathered keys outlive a chunk or a layer: the backward pass gathers and computes them
again. A context-parallel rank therefore holds activations of its own tokens only.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

#: Mask elements alive at a time.
CHUNK_ELEMENTS = 2**23

#: (first, last + 1 of this rank's queries) -> bool ``[B, 1, queries, keys]``, True = may attend.
MaskOf = Callable[[int, int], Tensor]


def attend_in_chunks(
    query: Tensor, key: Tensor, value: Tensor, mask_of: MaskOf, scale: float | None, group: dist.ProcessGroup | None
) -> Tensor:
    """Scaled dot product attention ``[B, heads, Nq, d]`` of this rank's queries to the keys of all ranks.

    Args:
        query: ``[B, heads, Nq, d]``.
        key, value: ``[B, groups, Nk, d]``, this rank's share.
        mask_of: the mask of some queries over the keys of all ranks, in the order of the ranks.
        scale: factor of the scores; None = 1 / sqrt(d).
        group: context-parallel ranks, None for one rank alone.
    """
    out: Tensor = _ChunkedAttention.apply(query, key, value, mask_of, scale, group)
    return out


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask_of: MaskOf,
        scale: float | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.mask_of, ctx.scale, ctx.group = mask_of, scale, group
        keys, values = _gather_both(key, value, group)
        parts = []
        for start, stop in _chunks(query, keys):
            visible, mask = _prune(mask_of(start, stop))
            parts.append(_attend(query[:, :, start:stop], _pick(keys, visible), _pick(values, visible), mask, scale))
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        keys, values = _gather_both(key, value, ctx.group)
        # Sums over many chunks and ranks: narrow ones would lose digits with every term.
        wide = torch.promote_types(keys.dtype, torch.float32)
        query_grad, both_grad = torch.empty_like(query), keys.new_zeros(2, *keys.shape, dtype=wide)
        for start, stop in _chunks(query, keys):
            visible, mask = _prune(ctx.mask_of(start, stop))
            inputs = [query[:, :, start:stop], _pick(keys, visible), _pick(values, visible)]
            inputs = [x.detach().requires_grad_() for x in inputs]
            with torch.enable_grad():
                out = _attend(*inputs, mask, ctx.scale)
            query_grad[:, :, start:stop], *grads = torch.autograd.grad(out, inputs, grad[:, :, start:stop])
            if visible is None:
                both_grad += torch.stack(grads)
            else:
                both_grad.index_add_(3, visible, torch.stack(grads).to(wide))
        key_grad, value_grad = reduce_scatter_sequence(both_grad, ctx.group).to(keys.dtype)
        return query_grad, key_grad, value_grad, None, None, None


def gather_sequence(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The shares ``[..., N, d]`` of all ranks, one behind the other: ``[..., ranks * N, d]``."""
    size = 1 if group is None else dist.get_world_size(group)
    if size == 1:
        return x
    gathered = x.new_empty(size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    return gathered.unflatten(0, (size, -1)).movedim(0, -3).flatten(-3, -2)


def reduce_scatter_sequence(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """This rank's share ``[..., N, d]`` of the sum over ranks of ``[..., ranks * N, d]``: backward of the gathering."""
    size = 1 if group is None else dist.get_world_size(group)
    if size == 1:
        return x
    by_rank = x.unflatten(-2, (size, -1)).movedim(-3, 0).contiguous()
    share = torch.empty_like(by_rank[0])
    dist.reduce_scatter_tensor(share, by_rank.flatten(0, 1), group=group)
    return share


def _gather_both(key: Tensor, value: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    if group is None:
        return key, value
    keys, values = gather_sequence(torch.stack([key, value]), group)
    return keys, values


def _chunks(query: Tensor, keys: Tensor) -> Iterator[tuple[int, int]]:
    num_queries = query.shape[2]
    size = max(1, CHUNK_ELEMENTS // (query.shape[0] * keys.shape[2]))
    for start in range(0, num_queries, size):
        yield start, min(start + size, num_queries)


def _prune(mask: Tensor) -> tuple[Tensor | None, Tensor]:
    """Keys that any query of the chunk sees, and the mask over them: two of three are seen by none in a two-stream row.

    Not on a GPU, where counting them would wait for the device.
    """
    if mask.device.type != "cpu":
        return None, mask
    visible = mask.any(dim=2).any(dim=0)[0].nonzero()[:, 0]
    return visible, mask[..., visible]


def _pick(x: Tensor, visible: Tensor | None) -> Tensor:
    return x if visible is None else x.index_select(2, visible)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=is_grouped)
