"""Attention of long and of packed rows: chunk by chunk of their queries, each over the keys that it sees.

Two of three keys of a two-stream row are seen by none of a chunk's queries, and in a packed row those of all other documents.
Keys and values are gathered over context-parallel ranks. Gathered keys do not outlive a layer: the backward pass gathers them and
computes the attention of a chunk again, so that a context-parallel rank holds activations of its own tokens only.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nemo_opdlm.diffusion.masks import AttentionRule, TokenAttributes, dense, may_be_seen

#: Queries of a chunk on a CPU: fewer see fewer keys, more make better use of a kernel.
CPU_QUERIES = 64
#: Mask elements of a chunk on other devices, where counting the keys that are seen would wait for the device.
CHUNK_ELEMENTS = 2**23
#: Mask elements that are kept from one layer and pass to the next; chunks beyond them are made anew each time.
KEPT_ELEMENTS = 2**25


@dataclass(frozen=True)
class Chunk:
    """Some queries and the keys that they see.

    Attributes:
        start, stop: first and last + 1 query.
        keys: ``[K]`` their numbers in ascending order, those that any of the queries sees in any row; None = all.
        may_attend: bool ``[B, 1, queries, K]``.
    """

    start: int
    stop: int
    keys: Tensor | None
    may_attend: Tensor

    def pick(self, x: Tensor) -> Tensor:
        """The chunk's keys (or values) of ``[..., Nk, d]``."""
        return x if self.keys is None else x.index_select(-2, self.keys)


class MaskChunks:
    """A mask chunk by chunk, as often as it is asked for.

    Args:
        rule: who may attend to whom.
        query: attributes ``[B, Nq]`` of this rank's tokens.
        key: attributes ``[B, Nk]`` of the tokens of all ranks.
    """

    def __init__(self, rule: AttentionRule, query: TokenAttributes, key: TokenAttributes) -> None:
        # Comparing narrow integers takes half the time.
        self._query, self._key = (x.map(lambda x: x.to(torch.int32)) for x in (query, key))
        self._rule = rule
        self._kept: dict[int, Chunk] = {}
        self._room = KEPT_ELEMENTS

    def __iter__(self) -> Iterator[Chunk]:
        """All chunks in the order of their queries."""
        num_queries = self._query.position_ids.shape[1]
        size = self._queries_at_a_time()
        for start in range(0, num_queries, size):
            yield self._kept.get(start) or self._keep(self._chunk(start, min(start + size, num_queries)))

    def _queries_at_a_time(self) -> int:
        is_cpu = self._key.position_ids.device.type == "cpu"
        return CPU_QUERIES if is_cpu else max(1, CHUNK_ELEMENTS // self._key.position_ids.numel())

    def _keep(self, chunk: Chunk) -> Chunk:
        if chunk.may_attend.numel() <= self._room:
            self._room -= chunk.may_attend.numel()
            self._kept[chunk.start] = chunk
        return chunk

    def _chunk(self, start: int, stop: int) -> Chunk:
        query = self._query.map(lambda x: x[:, start:stop])
        if self._key.position_ids.device.type != "cpu":
            return Chunk(start, stop, None, dense(self._rule, query, self._key))
        near = may_be_seen(query, self._key).any(0).nonzero()[:, 0]
        may_attend = dense(self._rule, query, self._key.map(lambda x: x[:, near]))
        is_seen = may_attend.any(dim=2).any(dim=0)[0]
        return Chunk(start, stop, near[is_seen], may_attend[..., is_seen])


def attend_in_chunks(
    query: Tensor, key: Tensor, value: Tensor, chunks: MaskChunks, scale: float | None, group: dist.ProcessGroup | None
) -> Tensor:
    """Scaled dot product attention ``[B, heads, Nq, d]`` of this rank's queries to the keys of all ranks.

    Args:
        query: ``[B, heads, Nq, d]``.
        key, value: ``[B, groups, Nk, d]``, this rank's share.
        chunks: the mask over the keys of all ranks, in the order of the ranks.
        scale: factor of the scores; None = 1 / sqrt(d).
        group: context-parallel ranks, None for one rank alone.
    """
    out: Tensor = _ChunkedAttention.apply(query, key, value, chunks, scale, group)
    return out


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        chunks: MaskChunks,
        scale: float | None,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.chunks, ctx.scale, ctx.group = chunks, scale, group
        keys, values = _gather_both(key, value, group)
        parts = [
            _attend(
                query[:, :, chunk.start : chunk.stop], chunk.pick(keys), chunk.pick(values), chunk.may_attend, scale
            )
            for chunk in chunks
        ]
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        keys, values = _gather_both(key, value, ctx.group)
        # Sums over many chunks and ranks: narrow ones would lose digits with every term.
        wide = torch.promote_types(keys.dtype, torch.float32)
        query_grad, both_grad = torch.empty_like(query), keys.new_zeros(2, *keys.shape, dtype=wide)
        for chunk in ctx.chunks:
            now = slice(chunk.start, chunk.stop)
            inputs = [x.detach().requires_grad_() for x in (query[:, :, now], chunk.pick(keys), chunk.pick(values))]
            with torch.enable_grad():
                queries, seen_keys, seen_values = inputs
                out = _attend(queries, seen_keys, seen_values, chunk.may_attend, ctx.scale)
            query_grad[:, :, now], *grads = torch.autograd.grad(out, inputs, grad[:, :, now])
            if chunk.keys is None:
                both_grad += torch.stack(grads)
            else:
                both_grad.index_add_(3, chunk.keys, torch.stack(grads).to(wide))
        key_grad, value_grad = reduce_scatter_sequence(both_grad, ctx.group).to(keys.dtype)
        return query_grad, key_grad, value_grad, None, None, None


def gather_sequence(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The shares ``[..., N, d]`` of all ranks, one behind the other: ``[..., ranks * N, d]``."""
    size = 1 if group is None else dist.get_world_size(group)
    if size == 1:
        return x
    gathered = x.new_empty(size * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x.contiguous(), group=group)
    by_rank: Tensor = gathered.unflatten(0, (size, -1))
    return by_rank.movedim(0, -3).flatten(-3, -2)


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


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    is_grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=is_grouped)
