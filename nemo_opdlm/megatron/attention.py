"""Core attention of student and teacher: one module, two rules (block diffusion or causal), with an optional KV cache.

It replaces ``core_attention`` in Megatron's stock layer spec. Megatron hands the ``attention_mask`` argument through every layer,
every recomputation and every pipeline stage untouched, so that argument carries the token attributes ``[B, N, 4]``
(``TokenAttributes.stack``), from which the rule derives who may attend to whom and where each token stands.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_opdlm.diffusion.masks import AttentionRule, TokenAttributes, dense
from nemo_opdlm.megatron.rotary import cos_sin, rotate


@dataclass
class AttentionPlan:
    """What all layers share for one batch: rotation by position and the dense mask (True = may attend)."""

    cos: Tensor
    sin: Tensor
    may_attend: Tensor | None


@dataclass(frozen=True)
class CachedQuery:
    """One batched forward against the cache: T packed tokens of A rows, at most Q of them each.

    Attributes:
        slots: ``[A]`` cache slot of each row.
        token_row, token_column: ``[T]`` place of each packed token in the ``[A, Q]`` query.
        position_ids: ``[T]`` absolute position of each packed token, where its key and value are written.
        may_attend: bool ``[A, 1, Q, K]`` over the first K cache positions.
        is_full: whether every place of the query holds a token, T = A * Q.
    """

    slots: Tensor
    token_row: Tensor
    token_column: Tensor
    position_ids: Tensor
    may_attend: Tensor
    is_full: bool


class KVCache:
    """Keys and values by slot and absolute position, per layer ``[slots, groups, length, head_dim]``.

    Every forward writes the keys of all its query tokens at their positions. Keys of a block that is still being denoised are
    overwritten by the next forward; keys beyond a query's own block are never visible, so nothing needs to be erased.
    """

    def __init__(self, num_slots: int, length: int) -> None:
        self.num_slots = num_slots
        self.length = length
        self.query: CachedQuery | None = None
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def update(self, layer_number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``key``/``value [T, groups, head_dim]`` and return the visible ``[A, groups, K, head_dim]`` of the rows."""
        assert self.query is not None
        if layer_number not in self._layers:
            shape = (self.num_slots, key.shape[1], self.length, key.shape[2])
            self._layers[layer_number] = (key.new_zeros(shape), value.new_zeros(shape))
        slots = self.query.slots
        visible = self.query.may_attend.shape[-1]
        token_slot = slots[self.query.token_row]
        all_slots = slots.shape[0] == self.num_slots
        views = []
        for store, new in zip(self._layers[layer_number], (key, value), strict=True):
            store[token_slot, :, self.query.position_ids] = new
            # Rows keep the order of their slots, so a full batch reads the store without a copy.
            views.append(store[:, :, :visible] if all_slots else store[slots, :, :visible])
        return views[0], views[1]

    def layer(self, layer_number: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[slots, groups, length, head_dim]`` of a layer (from 1) that has been written."""
        return self._layers[layer_number]


class AttentionContext:
    """State that the layers of one model share: the rule, the rotary table, the plan of the current batch, the cache."""

    def __init__(self, rule: AttentionRule, inv_freq: Tensor) -> None:
        self.rule = rule
        self.inv_freq = inv_freq
        self.cache: KVCache | None = None
        self._planned: tuple[Tensor, int, AttentionRule, AttentionPlan] | None = None

    @contextlib.contextmanager
    def use_cache(self, cache: KVCache, rule: AttentionRule) -> Iterator[None]:
        """Let the model attend to ``cache`` under ``rule`` while the context lasts; its memory is released afterwards."""
        previous_rule, self.cache, self.rule, self._planned = self.rule, cache, rule, None
        try:
            yield
        finally:
            self.cache, self.rule, self._planned = None, previous_rule, None

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
        attributes = TokenAttributes.unstack(stacked)
        inv_freq = self.inv_freq.to(stacked.device)
        cos, sin = cos_sin(inv_freq, attributes.position_ids.transpose(0, 1))
        mask = None if self.cache is not None else dense(self.rule, attributes, attributes)
        plan = AttentionPlan(cos.unsqueeze(2), sin.unsqueeze(2), mask)
        self._planned = (stacked, stacked._version, self.rule, plan)
        return plan


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
            return self._forward_cached(query.squeeze(1), key.squeeze(1), value.squeeze(1), self.context.cache)
        heads_first = [x.permute(1, 2, 0, 3) for x in (query, key, value)]
        out = self._attend(*heads_first, plan.may_attend)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _forward_cached(self, query: Tensor, key: Tensor, value: Tensor, cache: KVCache) -> Tensor:
        """Packed query tokens ``[T, heads, head_dim]`` against the cache: ``[T, 1, heads * head_dim]``."""
        step = cache.query
        assert step is not None
        cached_key, cached_value = cache.update(self.layer_number, key, value)
        num_rows, _, width, _ = step.may_attend.shape
        if step.is_full:
            padded = query.view(num_rows, width, *query.shape[1:])
        else:
            padded = query.new_zeros(num_rows, width, *query.shape[1:])
            padded[step.token_row, step.token_column] = query
        out = self._attend(padded.transpose(1, 2), cached_key, cached_value, step.may_attend).transpose(1, 2)
        out = out.flatten(0, 1) if step.is_full else out[step.token_row, step.token_column]
        return out.flatten(1).unsqueeze(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, may_attend: Tensor | None) -> Tensor:
        is_grouped = query.shape[1] != key.shape[1]
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=may_attend, scale=self.softmax_scale, enable_gqa=is_grouped
        )
