"""Reductions over the vocabulary, so that one formula serves a whole vocabulary and a tensor-parallel shard of it."""

from typing import Protocol

from torch import Tensor


class VocabReducer(Protocol):
    """What a formula may ask of a vocabulary that may be sharded; ``V_local`` columns live here.

    Attributes:
        start: global id of the first local column.
    """

    @property
    def start(self) -> int:
        """Global id of the first local column."""
        ...

    def max(self, x: Tensor) -> Tensor:
        """``[..., V_local]`` -> ``[...]``, largest value over the whole vocabulary, without gradient."""
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


class LocalVocab:
    """The whole vocabulary on one rank."""

    start = 0

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
