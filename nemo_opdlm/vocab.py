"""Reductions over the vocabulary, so that one formula serves a whole vocabulary and a tensor-parallel shard of it."""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

# Beyond every vocabulary, and its negative still fits into 32 bits: "no such id".
_NO_ID = 2**31 - 1


class VocabReducer(Protocol):
    """What a formula may ask of a vocabulary that may be sharded; ``V_local`` columns live here.

    All shards are equally wide and every answer is the same tensor on each of them.
    """

    @property
    def start(self) -> int:
        """Global id of the first local column."""
        ...

    @property
    def shard(self) -> int:
        """Number of shards that precede this one."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """``[..., V_local]`` -> ``[...]``, largest value over the whole vocabulary, without gradient.

        Whether a NaN on another shard shows is up to the backend: a sum shows it always.
        """
        ...

    def sum(self, x: Tensor) -> Tensor:
        """``[..., V_local]`` -> ``[...]``, sum over the whole vocabulary; backward is the identity on every shard."""
        ...

    def spread(self, x: Tensor) -> Tensor:
        """A reduced value ``[...]`` that meets sharded values again: forward identity, backward summed over shards."""
        ...

    def take(self, x: Tensor, ids: Tensor) -> Tensor:
        """``[..., V_local]`` at global ids ``[..., K]`` -> ``[..., K]``, from whichever shard owns them."""
        ...

    def gather(self, x: Tensor) -> Tensor:
        """Short lists ``[..., K]`` -> ``[..., num_shards * K]``, those of all shards in their order, without gradient."""
        ...


class LocalVocab:
    """The whole vocabulary on one rank."""

    start = 0
    shard = 0

    def max(self, x: Tensor) -> Tensor:
        """Largest value over the last dimension, without gradient."""
        return x.detach().amax(-1)

    def sum(self, x: Tensor) -> Tensor:
        """Sum over the last dimension."""
        return x.sum(-1)

    def spread(self, x: Tensor) -> Tensor:
        """The value itself."""
        return x

    def take(self, x: Tensor, ids: Tensor) -> Tensor:
        """Values at ``ids [..., K]``."""
        return x.gather(-1, ids)

    def gather(self, x: Tensor) -> Tensor:
        """The list itself, without gradient."""
        return x.detach()


def lowest_id(ids: Tensor, is_candidate: Tensor, vocab: VocabReducer) -> Tensor:
    """The lowest global id among the candidates of all shards, ``[..., K]`` -> ``[...]``; 0 where there are none."""
    lowest = -vocab.max(torch.where(is_candidate, -ids, -_NO_ID))
    return lowest.masked_fill(lowest == _NO_ID, 0)


def argmax(x: Tensor, vocab: VocabReducer) -> Tensor:
    """Global id of the largest value, ``[..., V_local]`` -> ``[...]``; the lowest of ties, any where there is a NaN."""
    column = x.argmax(-1, keepdim=True)
    best = x.gather(-1, column)
    return lowest_id(column + vocab.start, best == vocab.max(best)[..., None], vocab)


def top_k(x: Tensor, k: int, vocab: VocabReducer) -> tuple[Tensor, Tensor]:
    """The k largest values and their global ids, ``[..., V_local]`` -> twice ``[..., min(k, V)]``, largest first.

    Every shard offers its own k best and all choose from the same offers: of ids tied at the k-th place any may be
    kept, but the same on every shard. NaN counts as largest.
    """
    values, columns = x.topk(min(k, x.shape[-1]))
    offered, ids = vocab.gather(values), vocab.gather(columns + vocab.start)
    values, chosen = offered.topk(min(k, offered.shape[-1]))
    return values, ids.gather(-1, chosen)


def local_columns(mask: Tensor, width: int, vocab: VocabReducer) -> Tensor:
    """The part of ``mask [V]`` that meets ``width`` local columns, ``[width]``; True for rows added by padding."""
    mine = mask[vocab.start : vocab.start + width]
    return F.pad(mine, (0, width - mine.numel()), value=True)
