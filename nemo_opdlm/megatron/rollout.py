"""Block decoding on the training weights: a Denoiser over the Megatron network with a KV cache, in place and without a copy."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_opdlm.diffusion.masks import AttentionRule, TokenAttributes, dense
from nemo_opdlm.diffusion.proposal import Proposal, SamplingParams, propose
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.sampler import RolloutSettings, rollout
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.megatron.attention import CachedQuery, KVCache
from nemo_opdlm.megatron.forward import MicroBatch, forward_only
from nemo_opdlm.megatron.head import LMHead
from nemo_opdlm.megatron.student import HiddenStatesGPT, autocast
from nemo_opdlm.vocab import local_columns


class MegatronDenoiser:
    """Answers the sampler's questions with one network: what would stand at the masks of these blocks?

    Args:
        model: the network, read in place.
        cache: one slot per row of the batch.
        block_size: tokens of a block.
        mask_token_id: only positions holding it reach the LM head.
        sampling: temperature and filters of the proposals.
        forbidden: bool ``[V]``, tokens that are never proposed.
    """

    def __init__(
        self,
        model: HiddenStatesGPT,
        cache: KVCache,
        block_size: int,
        mask_token_id: int,
        sampling: SamplingParams,
        forbidden: Tensor,
    ) -> None:
        self.model = model
        self.cache = cache
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.sampling = sampling
        self.forbidden = forbidden
        self.head = LMHead(model)

    def prefill(self, rows: Tensor, token_ids: Tensor, position_ids: Tensor, valid: Tensor) -> None:
        """Write keys and values of whole prompt blocks ``[A, Q]``."""
        self._forward(rows, token_ids, position_ids, valid, lambda hidden: hidden.new_empty(0))

    def propose(
        self, rows: Tensor, token_ids: Tensor, position_ids: Tensor, valid: Tensor, uniform: Tensor
    ) -> Proposal:
        """Proposals ``[A, b]`` for the last b columns of the query ``[A, Q]``; writes the keys of all its tokens."""
        is_masked = token_ids[:, -self.block_size :] == self.mask_token_id
        asked = torch.zeros_like(valid)
        asked[:, -self.block_size :] = is_masked
        logits = self._forward(rows, token_ids, position_ids, valid, lambda hidden: self.logits(hidden[asked[valid]]))
        return self._propose_at(is_masked, logits, uniform)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[T, V_local]`` of the rows asked for; the one place where a rollout's logits exist."""
        return self.head.logits(hidden)

    def _propose_at(self, is_masked: Tensor, logits: Tensor, uniform: Tensor) -> Proposal:
        vocab = self.head.vocab
        forbidden = local_columns(self.forbidden, logits.shape[-1], vocab)
        at_masks = propose(logits, uniform[is_masked], self.sampling, forbidden, vocab)
        token_ids = torch.zeros_like(is_masked, dtype=torch.int64)
        token_ids[is_masked] = at_masks.token_ids
        confidence, entropy = (uniform.new_zeros(is_masked.shape, dtype=torch.float32) for _ in range(2))
        confidence[is_masked], entropy[is_masked] = at_masks.confidence, at_masks.entropy
        return Proposal(token_ids, confidence, entropy)

    def _forward(
        self, rows: Tensor, token_ids: Tensor, position_ids: Tensor, valid: Tensor, finish: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """Run the packed valid tokens through the network and ``finish`` their hidden states ``[T, hidden]``."""
        row, column = valid.nonzero(as_tuple=True)
        packed_positions = position_ids[row, column]
        visible = int(packed_positions.max()) + 1
        document = torch.arange(rows.shape[0], device=rows.device)[:, None]
        query = self._attributes(document.expand_as(position_ids), position_ids)
        keys = torch.arange(visible, device=rows.device)[None].expand(rows.shape[0], -1)
        may_attend = dense(self.model.attention.rule, query, self._attributes(document.expand_as(keys), keys))
        self.cache.query = CachedQuery(rows, row, column, packed_positions, may_attend, is_full=row.numel() == valid.numel())
        batch = MicroBatch(token_ids[row, column][None], self._attributes(row[None], packed_positions[None]))
        return forward_only(self.model, [batch], lambda hidden, _: finish(hidden[0]))[0]

    def _attributes(self, document_ids: Tensor, position_ids: Tensor) -> TokenAttributes:
        # A cached row is one clean stream: the block being denoised is its newest block.
        return TokenAttributes(
            document_ids, torch.zeros_like(document_ids), position_ids, position_ids // self.block_size
        )


class CausalDenoiser(MegatronDenoiser):
    """Plain autoregressive decoding through the same sampler: blocks of one token, judged by the token before it.

    The mask token of a block never enters the network: its proposal comes from the logits of the pending token.
    """

    def propose(
        self, rows: Tensor, token_ids: Tensor, position_ids: Tensor, valid: Tensor, uniform: Tensor
    ) -> Proposal:
        """Proposals ``[A, 1]`` from the pending token, the first of the two columns."""
        assert token_ids.shape[1] == 2, "autoregressive decoding needs a prompt token to start from"
        pending = slice(0, 1)
        logits = self._forward(
            rows, token_ids[:, pending], position_ids[:, pending], valid[:, pending], self.logits
        )
        return self._propose_at(torch.ones_like(uniform, dtype=torch.bool), logits, uniform)


@dataclass(frozen=True)
class RolloutEngine:
    """Decodes prompts in batches with a network in place.

    Attributes:
        model: the network whose weights decode.
        sampling: temperature and filters.
        forbidden: bool ``[V]`` (true vocabulary), never proposed.
        max_batch_size: rows decoded together; bounds the cache.
    """

    model: HiddenStatesGPT
    sampling: SamplingParams
    forbidden: Tensor
    max_batch_size: int

    def generate(
        self,
        prompt_ids: Tensor,
        prompt_len: Tensor,
        max_new_tokens: Tensor,
        sample_ids: Tensor,
        settings: RolloutSettings,
        on_progress: Callable[..., None] | None = None,
    ) -> Trajectory:
        """Block-diffusion rollouts of ``prompt_ids [B, P]``; see ``diffusion.sampler.rollout``."""
        return self._decode(
            MegatronDenoiser,
            AttentionRule.BLOCK_DIFFUSION,
            prompt_ids,
            prompt_len,
            max_new_tokens,
            sample_ids,
            settings,
            on_progress,
        )

    def generate_autoregressive(
        self,
        prompt_ids: Tensor,
        prompt_len: Tensor,
        max_new_tokens: Tensor,
        sample_ids: Tensor,
        settings: RolloutSettings,
        on_progress: Callable[..., None] | None = None,
    ) -> Trajectory:
        """Causal decoding with the same weights, token by token; the trajectory has the block size of ``settings``."""
        one_by_one = replace(
            settings,
            block_size=1,
            denoising_steps=1,
            remasking=RemaskingParams(RemaskingStrategy.LOW_CONFIDENCE_STATIC),
        )
        return self._decode(
            CausalDenoiser,
            AttentionRule.CAUSAL,
            prompt_ids,
            prompt_len,
            max_new_tokens,
            sample_ids,
            one_by_one,
            on_progress,
        ).with_block_size(settings.block_size)

    @torch.no_grad()
    def _decode(
        self,
        denoiser_type: type[MegatronDenoiser],
        rule: AttentionRule,
        prompt_ids: Tensor,
        prompt_len: Tensor,
        max_new_tokens: Tensor,
        sample_ids: Tensor,
        settings: RolloutSettings,
        on_progress: Callable[..., None] | None,
    ) -> Trajectory:
        was_training = self.model.training
        self.model.eval()
        try:
            # One region around all forwards: weights are cast once per rollout, not once per forward.
            with autocast(self.model.options.autocast_dtype, prompt_ids.device):
                batches = torch.arange(prompt_ids.shape[0], device=prompt_ids.device).split(self.max_batch_size)
                parts = [
                    self._decode_batch(
                        denoiser_type,
                        rule,
                        (prompt_ids[rows], prompt_len[rows], max_new_tokens[rows], sample_ids[rows]),
                        settings,
                        on_progress,
                    )
                    for rows in batches
                ]
        finally:
            self.model.train(was_training)
        return Trajectory.cat(parts)

    def _decode_batch(
        self,
        denoiser_type: type[MegatronDenoiser],
        rule: AttentionRule,
        requests: tuple[Tensor, Tensor, Tensor, Tensor],
        settings: RolloutSettings,
        on_progress: Callable[..., None] | None,
    ) -> Trajectory:
        """Decode rows that fit one cache, whose memory is released afterwards."""
        _, prompt_len, max_new_tokens, _ = requests
        longest = int((prompt_len + max_new_tokens).max())
        length = -(-longest // settings.block_size) * settings.block_size
        cache = KVCache(prompt_len.numel(), length)
        denoiser = denoiser_type(
            self.model, cache, settings.block_size, settings.mask_token_id, self.sampling, self.forbidden
        )
        with self.model.attention.use_cache(cache, rule):
            return rollout(denoiser, *requests, settings, on_progress)
