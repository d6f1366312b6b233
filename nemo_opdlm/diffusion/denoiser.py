"""What a sampler asks of a network, and what it is answered: the one seam between decoding and the network that decodes."""

from typing import NamedTuple, Protocol

from torch import Tensor

from nemo_opdlm.diffusion.proposal import Proposal


class Query(NamedTuple):
    """What the sampler asks of the network: a prefill where ``uniform`` is None, else proposals for a block.

    Every query token sees its slot's cache before its block, and its own block. A query from position 0 on begins a new
    row in its slot: what the slot held is never seen again. Keys and values of all tokens are written to the cache.

    Attributes:
        slots: int64 ``[A]``, the cache slots that take part, in rising order.
        token_ids: int64 ``[A, Q]``. A prefill has whole prompt blocks, seen under the block-causal rule. A proposal's
            query ends with the block; with Q = 2b it opens with the finished block before it.
        position_ids: int64 ``[A, Q]``; negative where a token is to be computed with the others, but to leave no trace.
        valid: bool ``[A, Q]`` on the host, which places hold a token.
        num_keys: no position of the query is as large.
        uniform: ``[A, b]``, random numbers of the proposals; in `speculate`, whose queries are laid out otherwise,
            ``[A, 2b - 1]``.
    """

    slots: Tensor
    token_ids: Tensor
    position_ids: Tensor
    valid: Tensor
    num_keys: int
    uniform: Tensor | None


class Denoiser(Protocol):
    """A network with a cache of keys and values, as the sampler sees it: tokens in, proposals out, never logits."""

    def prefill(self, query: Query) -> None:
        """Write the keys and values of whole prompt blocks under the block-causal rule."""
        ...

    def propose(self, query: Query) -> Proposal:
        """Propose tokens where the query has random numbers; those for a block are read at its masks only."""
        ...
