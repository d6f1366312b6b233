"""A Denoiser over the Megatron network with a KV cache, in place and without a copy, in parts that a pipeline can interleave."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_opdlm.diffusion.denoiser import Query
from nemo_opdlm.diffusion.masks import TokenAttributes, last_visible
from nemo_opdlm.diffusion.proposal import Proposal, SamplingParams, WorkingMemory, propose
from nemo_opdlm.megatron.attention import CachedQuery, KVCache
from nemo_opdlm.megatron.head import LMHead
from nemo_opdlm.megatron.inference import forward_chunk, suits
from nemo_opdlm.megatron.student import StagedGPT
from nemo_opdlm.vocab import local_columns


@dataclass(frozen=True)
class Forward:
    """One batched forward pass of the network: the packed tokens of a query, T of them.

    Attributes:
        token_ids: ``[1, T]``, filled up to the model's ``token_multiple``.
        attributes: of each packed token, ``[1, T]``.
        cached: where keys and values go, and who may attend to whom.
        asked: ``[M]`` packed tokens whose logits answer the query, in row-major order of ``is_asked``.
        is_asked: bool, of the shape of ``uniform``: what is proposed for; None for all of it.
        uniform: random numbers of the proposals, as in `Query`; None for a prefill.
    """

    token_ids: Tensor
    attributes: TokenAttributes
    cached: CachedQuery
    asked: Tensor
    is_asked: Tensor | None
    uniform: Tensor | None

    def map(self, function: Callable[[Tensor], Tensor]) -> "Forward":
        """The forward with all its tensors replaced."""
        return Forward(
            function(self.token_ids),
            self.attributes.map(function),
            self.cached.map(function),
            function(self.asked),
            None if self.is_asked is None else function(self.is_asked),
            None if self.uniform is None else function(self.uniform),
        )

    def tensors(self) -> list[Tensor]:
        """All its tensors, always in one order."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        self.map(note)
        return found


class MegatronDenoiser:
    """Answers the sampler's questions with one network: what would stand at the masks of these blocks?

    Args:
        model: the network, read in place.
        cache: a slot for every row that is decoded at a time.
        block_size: tokens of a block.
        mask_token_id: only positions holding it reach the LM head.
        sampling: temperature and filters of the proposals.
        forbidden: bool ``[V]``, tokens that are never proposed.
        fixed_shapes: propose for whole blocks, so that no shape depends on what is on the device, which would have to be
            waited for.
        memory: what proposals are made in; None = fresh memory for each forward.
    """

    def __init__(
        self,
        model: StagedGPT,
        cache: KVCache,
        block_size: int,
        mask_token_id: int,
        sampling: SamplingParams,
        forbidden: Tensor,
        *,
        fixed_shapes: bool = False,
        memory: WorkingMemory | None = None,
    ) -> None:
        self.model = model
        self.cache = cache
        self.block_size = block_size
        self.mask_token_id = mask_token_id
        self.sampling = sampling
        self.forbidden = forbidden
        self.fixed_shapes = fixed_shapes
        self.head = LMHead(model)
        self.is_lean = suits(model)
        self._memory = memory

    def prefill(self, query: Query) -> None:
        """Write keys and values of whole prompt blocks ``[A, Q]``."""
        self.forward(self.prepare(query))

    def propose(self, query: Query) -> Proposal:
        """Proposals ``[A, b]`` for the last b columns of the query ``[A, Q]``; writes the keys of all its tokens."""
        return self.answer(self.prepare(query))

    def prepare(self, query: Query) -> Forward:
        """What every stage of the pipeline has to know of the forward that answers a query."""
        if query.uniform is None:
            return self._pack(query, torch.empty(0, dtype=torch.int64, device=query.token_ids.device), None)
        if self.fixed_shapes:
            columns = torch.arange(-self.block_size, 0, device=query.slots.device)
            return self._pack(query, self._packed_columns(query, columns), None)
        is_asked = query.token_ids[:, -self.block_size :] == self.mask_token_id
        asked = torch.zeros_like(query.position_ids, dtype=torch.bool)
        asked[:, -self.block_size :] = is_asked
        return self._pack(query, self._packed_places(query, asked), is_asked)

    def forward(self, forward: Forward) -> Tensor:
        """Run it through all chunks of a network that is whole on this rank; hidden states ``[M, hidden]`` of what is asked."""
        assert self.model.parallel.pp_size == 1
        return self.run_chunk(0, forward, None)[0]

    def run_chunk(self, number: int, forward: Forward, hidden: Tensor | None) -> Tensor:
        """Run it through one chunk of this rank, from the hidden states of the chunk before (None for the first).

        Returns hidden states ``[T / TP or T, 1, hidden]`` for the next chunk, or ``[1, M, hidden]``, of the tokens that are
        asked, from the last one.
        """
        self.cache.query = forward.cached
        chunk, attributes = self.model[number], forward.attributes
        if self.is_lean:
            return forward_chunk(chunk, forward.token_ids, attributes, hidden, forward.asked)
        chunk.set_input_tensor([hidden])
        out: Tensor = chunk(forward.token_ids, attributes.position_ids, attributes.stack())
        return out[:, forward.asked] if chunk.post_process else out

    def read(self, forward: Forward, hidden: Tensor) -> Proposal:
        """Proposals from the last hidden states ``[M, hidden]``."""
        assert forward.uniform is not None
        logits, vocab = self.logits(hidden), self.head.vocab
        forbidden = local_columns(self.forbidden, logits.shape[-1], vocab)
        if forward.is_asked is None:
            proposal = propose(logits, forward.uniform.flatten(), self.sampling, forbidden, vocab, self._memory)
            shape = forward.uniform.shape
            return Proposal(
                proposal.token_ids.view(shape), proposal.confidence.view(shape), proposal.entropy.view(shape)
            )
        uniform = forward.uniform[forward.is_asked]
        at_masks = propose(logits, uniform, self.sampling, forbidden, vocab, self._memory)
        token_ids = torch.zeros_like(forward.is_asked, dtype=torch.int64)
        token_ids[forward.is_asked] = at_masks.token_ids
        confidence, entropy = (forward.uniform.new_zeros(token_ids.shape, dtype=torch.float32) for _ in range(2))
        confidence[forward.is_asked], entropy[forward.is_asked] = at_masks.confidence, at_masks.entropy
        return Proposal(token_ids, confidence, entropy)

    def answer(self, forward: Forward) -> Proposal:
        """Run a forward through a network that is whole on this rank, and read its proposals."""
        return self.read(forward, self.forward(forward))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[M, V_local]`` of the rows asked for; the one place where a rollout's logits exist.

        In the head's own dtype: proposals copy them to fp32 in any case.
        """
        return self.head.narrow_logits(hidden)

    @staticmethod
    def _packed_places(query: Query, asked: Tensor) -> Tensor:
        """Numbers among the packed tokens of those that are ``asked``, bool ``[A, Q]``."""
        return asked[query.valid.to(asked.device)].nonzero()[:, 0]

    @staticmethod
    def _packed_columns(query: Query, columns: Tensor) -> Tensor:
        """Numbers among the packed tokens of some columns ``[C]`` or ``[A, C]`` of a query without gaps."""
        num_rows, width = query.valid.shape
        rows = torch.arange(num_rows, device=query.slots.device)[:, None]
        return (rows * width + columns % width).flatten()

    def _pack(self, query: Query, asked: Tensor, is_asked: Tensor | None) -> Forward:
        """Pack the valid tokens of a query; ``asked`` and ``is_asked`` are those of `Forward`."""
        # Tokens that are to leave no trace see the first key, which is finite, and stand behind all others.
        visible = self._last_visible(query).clamp(min=0)
        position_ids = torch.where(query.position_ids < 0, self.cache.length, query.position_ids)
        is_full = bool(query.valid.all())
        row, column = _rows_and_columns(query.valid, is_full, position_ids.device)
        packed_positions = position_ids[row, column]
        # A prompt has queries enough of its own, and its mask is large; FlexAttention groups heads itself.
        is_prompt, uses_flex = query.uniform is None, self.model.attention.uses_flex
        cached = CachedQuery(
            query.slots,
            row,
            column,
            packed_positions,
            visible,
            self.cache.length if uses_flex and not is_prompt else query.num_keys,
            1 if uses_flex or is_prompt else self._heads_per_group,
            is_full,
            in_tiles=uses_flex and not is_prompt,
        )
        # What fills up the packed tokens reaches no cache.
        filler = (0, -row.numel() % self.model.token_multiple)
        return Forward(
            F.pad(query.token_ids[row, column], filler)[None],
            self._attributes(F.pad(row, filler)[None], F.pad(packed_positions, filler)[None]),
            cached,
            asked,
            is_asked,
            query.uniform,
        )

    def _last_visible(self, query: Query) -> Tensor:
        """The last key of its slot that each token of a query sees, ``[A, Q]``; below 0 where it leaves no trace."""
        return last_visible(self.model.attention.rule, query.position_ids, self.block_size)

    def _attributes(self, document_ids: Tensor, position_ids: Tensor) -> TokenAttributes:
        # A cached row is one clean stream: the block being denoised is its newest block.
        return TokenAttributes(
            document_ids, torch.zeros_like(document_ids), position_ids, position_ids // self.block_size
        )

    @property
    def _heads_per_group(self) -> int:
        config = self.model.config
        return int(config.num_attention_heads // (config.num_query_groups or config.num_attention_heads))


def _rows_and_columns(valid: Tensor, is_full: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Places of the tokens of a query, row by row; a full one sends nothing to the device."""
    if not is_full:
        row, column = torch.stack(valid.nonzero(as_tuple=True)).to(device)
        return row, column
    places = torch.arange(valid.numel(), device=device)
    return places // valid.shape[1], places % valid.shape[1]


class CausalDenoiser(MegatronDenoiser):
    """Plain autoregressive decoding through the same sampler: blocks of one token, judged by the token before it.

    The mask token of a block never enters the network: its proposal comes from the logits of the pending token.
    """

    def prepare(self, query: Query) -> Forward:
        """A prefill as it is; else the pending token alone, the first of the two columns."""
        if query.uniform is None:
            return super().prepare(query)
        assert query.token_ids.shape[1] == 2, "autoregressive decoding needs a prompt token to start from"
        pending = {name: getattr(query, name)[:, :1] for name in ("token_ids", "position_ids", "valid")}
        pending_query = query._replace(**pending)
        first = torch.zeros(1, dtype=torch.int64, device=query.slots.device)
        return self._pack(pending_query, self._packed_columns(pending_query, first), None)
