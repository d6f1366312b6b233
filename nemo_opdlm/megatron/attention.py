"""Core attention of student and teacher: one module, two rules (block diffusion or causal), with an optional KV cache.

It replaces ``core_attention`` in Megatron's stock layer spec. Megatron hands the ``attention_mask`` argument through every layer,
every recomputation and every pipeline stage untouched, so that argument carries the token attributes ``[B, N, 4]``
(``TokenAttributes.stack``), from which the rule derives who may attend to whom and where each token stands.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from nemo_opdlm.diffusion.masks import AttentionRule, TokenAttributes, dense
from nemo_opdlm.megatron.chunked_attention import MaskChunks, attend_in_chunks, gather_sequence
from nemo_opdlm.megatron.flex import attend_in_tiles, block_mask, cached_block_mask
from nemo_opdlm.megatron.rotary import cos_sin, rotate

#: Tokens of a row up to which it is attended at once.
DENSE_LENGTH = 256


@dataclass
class AttentionPlan:
    """What all layers share for one batch.

    Attributes:
        cos, sin: rotation by position, of this rank's tokens.
        mask: who may attend to whom. Dense for short rows (True = may attend) and caches, in tiles for FlexAttention, else in
            chunks over the keys of all context-parallel ranks.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | BlockMask | MaskChunks


@dataclass(frozen=True)
class CachedQuery:
    """One batched forward against the cache: T packed tokens of A rows, at most Q of them each.

    Attributes:
        slots: ``[A]`` cache slot of each row.
        token_row, token_column: ``[T]`` place of each packed token in the ``[A, Q]`` query.
        position_ids: ``[T]`` absolute position of each packed token, where its key and value are written.
        last_visible: ``[A, Q]`` the last position of its slot that each query token sees; it sees all before it.
        num_keys: no token sees as large a position.
        joined_heads: query heads of a group that are attended as further rows of one head: a group's keys are then read once.
            1: not so, the kernel pairs heads and groups.
        is_full: whether every place of the query holds a token, T = A * Q.
        in_tiles: whether FlexAttention reads the cache where it lies.
    """

    slots: Tensor
    token_row: Tensor
    token_column: Tensor
    position_ids: Tensor
    last_visible: Tensor
    num_keys: int
    joined_heads: int
    is_full: bool
    in_tiles: bool = False

    def map(self, function: Callable[[Tensor], Tensor]) -> "CachedQuery":
        """The query with all its tensors replaced."""
        return replace(
            self,
            slots=function(self.slots),
            token_row=function(self.token_row),
            token_column=function(self.token_column),
            position_ids=function(self.position_ids),
            last_visible=function(self.last_visible),
        )


class KVCache:
    """Keys and values by slot and absolute position, per layer ``[slots, groups, length + 1, head_dim]``.

    Every forward writes the keys of all its query tokens at their positions. Keys of a block that is still being denoised are
    overwritten by the next forward; keys beyond a query's own block are never visible, so nothing needs to be erased. The
    place behind the last position takes what is to leave no trace.
    """

    def __init__(self, num_slots: int, length: int) -> None:
        self.num_slots = num_slots
        self.length = length
        self.query: CachedQuery | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._numbers = (torch.empty(0), torch.empty(0))

    def update(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``key``/``value [T, groups, head_dim]``; the visible ``[A, groups, K, head_dim]`` of the rows, or of all slots
        their whole length where they are read in tiles.
        """
        assert self.query is not None
        if layer_number not in self._layers:
            shape = (self.num_slots, key.shape[1], self.length + 1, key.shape[2])
            # Under autocast norms hand over wider keys than values.
            self._layers[layer_number] = (value.new_zeros(shape), value.new_zeros(shape))
        slots, in_tiles = self.query.slots, self.query.in_tiles
        visible = self.length + 1 if in_tiles else self.query.num_keys
        token_slot = slots[self.query.token_row]
        all_slots = in_tiles or slots.shape[0] == self.num_slots
        views = []
        for store, new in zip(self._layers[layer_number], (key, value), strict=True):
            store[token_slot, :, self.query.position_ids] = new.to(store.dtype)
            # Rows keep the order of their slots, so a full batch reads the store without a copy.
            views.append(store[:, :, :visible] if all_slots else store[slots, :, :visible])
        return views[0], views[1]

    def mask(self) -> Tensor | BlockMask:
        """Who sees which key of its slot: in tiles, or bool ``[A, 1, joined_heads * Q, num_keys]``."""
        query = self.query
        assert query is not None
        if query.in_tiles:
            return cached_block_mask(query.slots, query.last_visible, self.num_slots, self.length + 1)
        keys = torch.arange(query.num_keys, device=query.last_visible.device)
        return (keys <= query.last_visible[:, :, None]).repeat(1, query.joined_heads, 1)[:, None]

    def as_numbers(self, mask: Tensor, dtype: torch.dtype) -> Tensor:
        """A bool mask as what is added to scores, once for all layers: on a CPU each layer would make these numbers anew."""
        if mask.is_cuda:
            return mask
        known, numbers = self._numbers
        if known is not mask or numbers.dtype != dtype:
            numbers = torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, -torch.inf)
            self._numbers = mask, numbers
        return numbers

    def layer(self, layer_number: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[slots, groups, length + 1, head_dim]`` of a layer (from 1) that has been written."""
        return self._layers[layer_number]


class AttentionContext:
    """State that the layers of one model share: the rule, the rotary table, the plan of the current batch, the cache.

    Args:
        rule: who may attend to whom.
        inv_freq: rotary frequencies.
        context_group: the model's context-parallel ranks, None for one rank alone. They share rows only within
            ``split_rows``: otherwise each of them works on rows of its own, as data-parallel ranks do.
        uses_flex: whether rows that no other rank has a part of are attended by FlexAttention.
    """

    def __init__(
        self,
        rule: AttentionRule,
        inv_freq: Tensor,
        context_group: dist.ProcessGroup | None = None,
        uses_flex: bool = False,
    ) -> None:
        self.rule = rule
        self.uses_flex = uses_flex
        self.inv_freq = inv_freq
        self.context_group = context_group
        self.cache: KVCache | None = None
        self._split_group: dist.ProcessGroup | None = None
        self._planned: tuple[Tensor, int, AttentionRule, AttentionPlan] | None = None

    @property
    def split_group(self) -> dist.ProcessGroup | None:
        """The ranks that share each row, None where every rank has rows of its own."""
        return self._split_group

    @contextlib.contextmanager
    def split_rows(self) -> Iterator[None]:
        """While the context lasts, every context-parallel rank brings its share of the tokens of each row."""
        group = self.context_group
        self._split_group = group if group is not None and dist.get_world_size(group) > 1 else None
        try:
            yield
        finally:
            self._split_group = self._planned = None

    @contextlib.contextmanager
    def use_rule(self, rule: AttentionRule) -> Iterator[None]:
        """Let the model attend by ``rule`` while the context lasts."""
        previous, self.rule, self._planned = self.rule, rule, None
        try:
            yield
        finally:
            self.rule, self._planned = previous, None

    @contextlib.contextmanager
    def use_cache(self, cache: KVCache) -> Iterator[None]:
        """Let the model attend to ``cache`` while the context lasts."""
        self.cache, self._planned = cache, None
        try:
            yield
        finally:
            self.cache = self._planned = None

    def plan(self, stacked: Tensor) -> AttentionPlan:
        """The plan of this batch, built by its first layer and reused by the others.

        Recomputation hands in a detached alias of the same storage, hence the comparison by address and version; the plan
        keeps its tensor alive, so the address cannot be reused.
        """
        if self._planned is not None:
            known, version, rule, plan = self._planned
            same_storage = known.data_ptr() == stacked.data_ptr() and known.shape == stacked.shape
            if same_storage and version == stacked._version and rule is self.rule:
                return plan
        plan = self._make_plan(stacked)
        self._planned = (stacked, stacked._version, self.rule, plan)
        return plan

    def _make_plan(self, stacked: Tensor) -> AttentionPlan:
        position_ids = TokenAttributes.unstack(stacked).position_ids
        cos, sin = cos_sin(self.inv_freq.to(stacked.device), position_ids.transpose(0, 1))
        mask = self._mask(stacked) if self.cache is None else self.cache.mask()
        return AttentionPlan(cos.unsqueeze(2), sin.unsqueeze(2), mask)

    def _mask(self, stacked: Tensor) -> Tensor | BlockMask | MaskChunks:
        tokens = TokenAttributes.unstack(stacked)
        if self._split_group is not None:
            return MaskChunks(self.rule, tokens, TokenAttributes.unstack(gather_sequence(stacked, self._split_group)))
        if self.uses_flex:
            return block_mask(self.rule, tokens)
        if stacked.shape[1] <= DENSE_LENGTH:
            return dense(self.rule, tokens, tokens)
        return MaskChunks(self.rule, tokens, tokens)


class BlockDiffusionAttention(torch.nn.Module):
    """Megatron core attention ``[S, B, heads, head_dim] -> [S, B, heads * head_dim]`` under the context's rule.

    Args:
        context: state shared by all layers of the model.
        config: Megatron's transformer config (grouped queries, softmax scale).
        layer_number: 1-based global layer number, the key of this layer's cache.
    """

    def __init__(
        self,
        context: AttentionContext,
        *,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: object,
    ) -> None:
        super().__init__()
        assert attention_type == "self", attention_type
        self.context = context
        self.config = config
        self.layer_number = layer_number
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor,
        *,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """Attend; ``attention_mask`` carries the stacked token attributes ``[B, S, 4]``."""
        plan = self.context.plan(attention_mask)
        query, key = rotate(query, plan.cos, plan.sin), rotate(key, plan.cos, plan.sin)
        if self.context.cache is not None:
            grouped = query.squeeze(1).unflatten(1, (key.shape[2], -1))
            return self.attend_cached(grouped, key.squeeze(1), value.squeeze(1), plan.mask)
        # A view of it would keep the rest of what it was cut out of, which the turned queries and keys have replaced.
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value.contiguous()))
        if isinstance(plan.mask, MaskChunks):
            out = attend_in_chunks(query, key, value, plan.mask, self.softmax_scale, self.context.split_group)
        elif isinstance(plan.mask, BlockMask):
            out = attend_in_tiles(query, key, value, plan.mask, self.softmax_scale)
        else:
            out = self._attend(query, key, value, plan.mask)
        return out.permute(2, 0, 1, 3).flatten(2)

    def attend_cached(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | BlockMask | MaskChunks) -> Tensor:
        """Packed query tokens ``[T, groups, heads of a group, head_dim]`` against the cache; filler gets 0.

        Keys ``[T, groups, head_dim]`` are stored in the dtype of the values, in which everything is computed; ``mask`` is the
        cache's, as the plan holds it. Returns ``[T, 1, heads * head_dim]``.
        """
        cache = self.context.cache
        assert cache is not None and cache.query is not None and not isinstance(mask, MaskChunks)
        step = cache.query
        num_tokens, num_filler = step.token_row.numel(), query.shape[0] - step.token_row.numel()
        query, key, value = query[:num_tokens], key[:num_tokens], value[:num_tokens]
        keys, values = cache.update(self.layer_number, key, value)
        if isinstance(mask, BlockMask):
            out = self._attend_in_place(query.flatten(1, 2).to(keys.dtype), keys, values, mask, step)
        else:
            out = self._attend_rows(query, keys, values, cache.as_numbers(mask, keys.dtype), step)
        return (F.pad(out, (0, 0, 0, num_filler)) if num_filler else out).unsqueeze(1)

    def _attend_rows(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, step: CachedQuery) -> Tensor:
        """``[T, heads * head_dim]`` from the visible keys of the rows."""
        num_rows, width = step.last_visible.shape
        if step.is_full:
            padded = query.unflatten(0, (num_rows, width))
        else:
            padded = query.new_zeros(num_rows, width, *query.shape[1:])
            padded[step.token_row, step.token_column] = query
        # [A, Q, groups, heads of a group, head_dim], with the heads of a group as further rows of one head, or as they are.
        by_head = padded.permute(0, 2, 3, 1, 4)
        by_head = torch.empty(by_head.shape, dtype=keys.dtype, device=keys.device).copy_(by_head)
        _, groups, heads, _, _ = by_head.shape
        if step.joined_heads > 1:
            out: Tensor = self._attend(by_head.flatten(2, 3), keys, values, mask).unflatten(2, (heads, width))
        else:
            out = self._attend(by_head.flatten(1, 2), keys, values, mask).unflatten(1, (groups, heads))
        out = out.permute(0, 3, 1, 2, 4).flatten(2)
        return out.flatten(0, 1) if step.is_full else out[step.token_row, step.token_column]

    def _attend_in_place(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: BlockMask, step: CachedQuery
    ) -> Tensor:
        """``[T, heads * head_dim]`` from all slots, of which those that take no part have no visible tile."""
        places = step.slots[step.token_row], step.token_column
        padded = query.new_zeros(keys.shape[0], step.last_visible.shape[1], *query.shape[1:])
        padded[places] = query
        out = attend_in_tiles(padded.transpose(1, 2), keys, values, mask, self.softmax_scale)
        return out.transpose(1, 2)[places].flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, may_attend: Tensor | None) -> Tensor:
        is_grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=may_attend, scale=self.softmax_scale, enable_gqa=is_grouped
        )
