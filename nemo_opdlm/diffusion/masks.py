"""Who may attend to whom: named predicates OR-ed together, one definition for dense masks and for FlexAttention.

A token is described by four integers (:class:`TokenAttributes`); a predicate compares two tokens. True means visible.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

PADDING_DOCUMENT = -1
CLEAN_STREAM = 0


@dataclass(frozen=True)
class TokenAttributes:
    """What a mask has to know of each token, four int64 tensors of one shape, usually ``[B, N]``.

    Padding shares document -1, stream 0, position 0 and block 0: it sees itself, so no row of a mask is empty.

    Attributes:
        document_ids: tokens of different documents never see each other.
        stream_ids: 0 for prompt and clean tokens, s for state copy s = 1 .. c.
        position_ids: absolute positions; a state token has the position of its clean twin.
        block_ids: ``position // block_size``.
    """

    document_ids: Tensor
    stream_ids: Tensor
    position_ids: Tensor
    block_ids: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "TokenAttributes":
        """The same function on all four tensors."""
        return TokenAttributes(
            function(self.document_ids),
            function(self.stream_ids),
            function(self.position_ids),
            function(self.block_ids),
        )

    def stack(self) -> Tensor:
        """One int64 tensor ``[..., 4]``, for interfaces that carry a single tensor."""
        return torch.stack([self.document_ids, self.stream_ids, self.position_ids, self.block_ids], -1)

    @staticmethod
    def unstack(stacked: Tensor) -> "TokenAttributes":
        """Undo :meth:`stack`."""
        return TokenAttributes(*stacked.unbind(-1))


Predicate = Callable[[TokenAttributes, TokenAttributes], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def same_document(q: TokenAttributes, k: TokenAttributes) -> Tensor:
    """Both belong to one document."""
    return q.document_ids == k.document_ids


def clean_block_causal(q: TokenAttributes, k: TokenAttributes) -> Tensor:
    """A prompt or clean token sees prompt and clean tokens of its own and earlier blocks."""
    return _both_clean(q, k) & (k.block_ids <= q.block_ids)


def state_sees_clean_past(q: TokenAttributes, k: TokenAttributes) -> Tensor:
    """A state token sees prompt and clean tokens of earlier blocks only: its own clean block is the answer."""
    return (q.stream_ids != CLEAN_STREAM) & (k.stream_ids == CLEAN_STREAM) & (k.block_ids < q.block_ids)


def state_sees_own_block(q: TokenAttributes, k: TokenAttributes) -> Tensor:
    """A state token sees its block in its own copy, in both directions."""
    return (q.stream_ids != CLEAN_STREAM) & (k.stream_ids == q.stream_ids) & (k.block_ids == q.block_ids)


def causal(q: TokenAttributes, k: TokenAttributes) -> Tensor:
    """A clean token sees itself and what stands before it."""
    return _both_clean(q, k) & (k.position_ids <= q.position_ids)


def _both_clean(q: TokenAttributes, k: TokenAttributes) -> Tensor:
    return (q.stream_ids == CLEAN_STREAM) & (k.stream_ids == CLEAN_STREAM)


class AttentionRule(StrEnum):
    """How a network attends: the student's block diffusion, or the autoregressive teacher's order of the text."""

    BLOCK_DIFFUSION = "block_diffusion"
    CAUSAL = "causal"


_PREDICATES: dict[AttentionRule, tuple[Predicate, ...]] = {
    AttentionRule.BLOCK_DIFFUSION: (clean_block_causal, state_sees_clean_past, state_sees_own_block),
    AttentionRule.CAUSAL: (causal,),
}


def dense(rule: AttentionRule, query: TokenAttributes, key: TokenAttributes) -> Tensor:
    """Mask bool ``[B, 1, Nq, Nk]`` for scaled dot product attention; True = may attend.

    State tokens are no part of the causal rule: they see nothing and nothing sees them.
    """
    q, k = query.map(lambda x: x[:, None, :, None]), key.map(lambda x: x[:, None, None, :])
    return _may_attend(_PREDICATES[rule], q, k)


def last_visible(rule: AttentionRule, position_ids: Tensor, block_size: int) -> Tensor:
    """The last position that each clean token sees by the rule in its own document, all of whose earlier ones it sees."""
    if rule is AttentionRule.CAUSAL:
        return position_ids
    return position_ids // block_size * block_size + block_size - 1


def may_be_seen(query: TokenAttributes, key: TokenAttributes) -> Tensor:
    """Keys bool ``[B, Nk]`` that any of the queries ``[B, Nq]`` could see by any rule: a bound on `dense`, at no cost per pair.

    Nobody sees another document, later blocks, or state tokens of other blocks.
    """
    documents, blocks = query.document_ids, query.block_ids
    is_near = (key.document_ids >= documents.amin(1, True)) & (key.document_ids <= documents.amax(1, True))
    is_past = key.block_ids <= blocks.amax(1, True)
    return is_near & is_past & ((key.stream_ids == CLEAN_STREAM) | (key.block_ids >= blocks.amin(1, True)))


def mask_mod(rule: AttentionRule, query: TokenAttributes, key: TokenAttributes) -> MaskMod:
    """The same mask as a function ``(batch, head, query index, key index) -> bool`` for FlexAttention."""
    # The function closes over the predicates, not over the rule: torch.compile does not guard enum members in closures
    # (seen in torch 2.13), and would go on with the mask of the rule that it saw first.
    predicates = _PREDICATES[rule]

    def may_attend_at(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return _may_attend(predicates, query.map(lambda x: x[b, q_idx]), key.map(lambda x: x[b, kv_idx]))

    return may_attend_at


def _may_attend(predicates: tuple[Predicate, ...], q: TokenAttributes, k: TokenAttributes) -> Tensor:
    visible = torch.zeros((), dtype=torch.bool, device=q.block_ids.device)
    for predicate in predicates:
        visible = visible | predicate(q, k)
    return visible & same_document(q, k)
