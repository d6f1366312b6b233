"""A Denoiser over the Megatron network with a KV cache, in place and without a copy, in parts that a pipeline can interleave."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_opdlm.diffusion.masks import TokenAttributes, dense
from nemo_opdlm.diffusion.proposal import Proposal, SamplingParams, propose
from nemo_opdlm.diffusion.sampler import Query
from nemo_opdlm.megatron.attention import CachedQuery, KVCache
from nemo_opdlm.megatron.head import LMHead
from nemo_opdlm.megatron.student import StagedGPT
from nemo_opdlm.vocab import local_columns


@dataclass(frozen=True)
class Forward:
    """One batched forward pass of the network: the packed tokens of a query, T of them.

    Attributes:
        token_ids: ``[1, T]``, filled up to equal parts under sequence parallelism.
        attributes: of each packed token, ``[1, T]``.
        cached: where keys and values go, and who may attend to whom.
        asked: ``[M]`` packed tokens whose logits answer the query, in row-major order of ``is_masked``.
        is_masked: bool ``[A, b]`` places of the block that are proposed for.
        uniform: ``[A, b]`` random numbers of the proposals; None for a prefill.
    """

    token_ids: Tensor
    attributes: TokenAttributes
    cached: CachedQuery
    asked: Tensor
    is_masked: Tensor
    uniform: Tensor | None


class MegatronDenoiser:
    """Answers the sampler's questions with one network: what would stand at the masks of these blocks?

    Args:
        model: the network, read in place.
        cache: a slot for every row that is decoded at a time.
        block_size: tokens of a block.
        mask_token_id: only positions holding it reach the LM head.
        sampling: temperature and filters of the proposals.
        forbidden: bool ``[V]``, tokens that are never proposed.
    """

    def __init__(
        self,
        model: StagedGPT,
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

    def prefill(self, slots: Tensor, token_ids: Tensor, position_ids: Tensor, valid: Tensor) -> None:
        """Write keys and values of whole prompt blocks ``[A, Q]``."""
        self.forward(self.prepare(Query(slots, token_ids, position_ids, valid, None)))

    def propose(
        self, slots: Tensor, token_ids: Tensor, position_ids: Tensor, valid: Tensor, uniform: Tensor
    ) -> Proposal:
        """Proposals ``[A, b]`` for the last b columns of the query ``[A, Q]``; writes the keys of all its tokens."""
        forward = self.prepare(Query(slots, token_ids, position_ids, valid, uniform))
        return self.read(forward, self.forward(forward))

    def prepare(self, query: Query) -> Forward:
        """What every stage of the pipeline has to know of the forward that answers a query."""
        is_masked = query.token_ids[:, -self.block_size :] == self.mask_token_id
        asked = torch.zeros_like(query.valid)
        asked[:, -self.block_size :] = is_masked
        return self._pack(query, asked, is_masked)

    def forward(self, forward: Forward) -> Tensor:
        """Run it through all chunks of a network that is whole on this rank; its last hidden states ``[T, hidden]``."""
        assert self.model.parallel.pp_size == 1
        return self.run_chunk(0, forward, None)[0]

    def run_chunk(self, number: int, forward: Forward, hidden: Tensor | None) -> Tensor:
        """Run it through one chunk of this rank, from the hidden states of the chunk before (None for the first).

        Returns hidden states ``[T / TP or T, 1, hidden]`` for the next chunk, or ``[1, T, hidden]`` from the last one.
        """
        self.cache.query = forward.cached
        chunk, attributes = self.model[number], forward.attributes
        chunk.set_input_tensor([hidden])
        out: Tensor = chunk(forward.token_ids, attributes.position_ids, attributes.stack())
        return out

    def read(self, forward: Forward, hidden: Tensor) -> Proposal:
        """Proposals from the last hidden states ``[T, hidden]``."""
        assert forward.uniform is not None
        logits, vocab = self.logits(hidden[forward.asked]), self.head.vocab
        forbidden = local_columns(self.forbidden, logits.shape[-1], vocab)
        at_masks = propose(logits, forward.uniform[forward.is_masked], self.sampling, forbidden, vocab)
        token_ids = torch.zeros_like(forward.is_masked, dtype=torch.int64)
        token_ids[forward.is_masked] = at_masks.token_ids
        confidence, entropy = (forward.uniform.new_zeros(token_ids.shape, dtype=torch.float32) for _ in range(2))
        confidence[forward.is_masked], entropy[forward.is_masked] = at_masks.confidence, at_masks.entropy
        return Proposal(token_ids, confidence, entropy)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[T, V_local]`` of the rows asked for; the one place where a rollout's logits exist."""
        return self.head.logits(hidden)

    def _pack(self, query: Query, asked: Tensor, is_masked: Tensor) -> Forward:
        """Pack the valid tokens of a query; ``asked [A, Q]`` marks those whose logits answer it."""
        slots, _, position_ids, valid, uniform = query
        row, column = valid.nonzero(as_tuple=True)
        packed_positions = position_ids[row, column]
        visible = int(packed_positions.max()) + 1
        document = torch.arange(slots.shape[0], device=slots.device)[:, None]
        keys = torch.arange(visible, device=slots.device)[None].expand(slots.shape[0], -1)
        may_attend = dense(
            self.model.attention.rule,
            self._attributes(document.expand_as(position_ids), position_ids),
            self._attributes(document.expand_as(keys), keys),
        )
        cached = CachedQuery(slots, row, column, packed_positions, may_attend, is_full=row.numel() == valid.numel())
        # Sequence parallelism cuts the packed tokens into equal parts; what fills them up reaches no cache.
        multiple = self.model.parallel.tp_size if self.model.config.sequence_parallel else 1
        filler = (0, -row.numel() % multiple)
        return Forward(
            F.pad(query.token_ids[row, column], filler)[None],
            self._attributes(F.pad(row, filler)[None], F.pad(packed_positions, filler)[None]),
            cached,
            asked[valid].nonzero()[:, 0],
            is_masked,
            uniform,
        )

    def _attributes(self, document_ids: Tensor, position_ids: Tensor) -> TokenAttributes:
        # A cached row is one clean stream: the block being denoised is its newest block.
        return TokenAttributes(
            document_ids, torch.zeros_like(document_ids), position_ids, position_ids // self.block_size
        )


class CausalDenoiser(MegatronDenoiser):
    """Plain autoregressive decoding through the same sampler: blocks of one token, judged by the token before it.

    The mask token of a block never enters the network: its proposal comes from the logits of the pending token.
    """

    def prepare(self, query: Query) -> Forward:
        """A prefill as it is; else the pending token alone, the first of the two columns."""
        if query.uniform is None:
            return super().prepare(query)
        assert query.token_ids.shape[1] == 2, "autoregressive decoding needs a prompt token to start from"
        slots, *columns = query[:-1]
        pending = Query(slots, *(x[:, :1] for x in columns), query.uniform)
        everywhere = torch.ones_like(pending.valid)
        return self._pack(pending, everywhere, everywhere)
