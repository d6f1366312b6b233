"""A network of nothing but hashes, which makes sampler tests a matter of milliseconds."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemo_opdlm.diffusion.denoiser import Query
from nemo_opdlm.diffusion.proposal import Proposal, SamplingParams, propose
from nemo_opdlm.rng import Stream, uniform
from nemo_opdlm.vocab import LocalVocab


@dataclass(frozen=True)
class Call:
    """One call of a denoiser as it came in: rows ``[A]`` and their query ``[A, Q]``."""

    rows: Tensor
    token_ids: Tensor
    position_ids: Tensor
    valid: Tensor

    @staticmethod
    def of(query: Query) -> "Call":
        """What stands in a query, without the tokens that leave no trace."""
        assert bool((query.position_ids < query.num_keys).all())
        return Call(query.slots, query.token_ids, query.position_ids, query.valid & (query.position_ids >= 0))


@dataclass
class FakeDenoiser:
    """A Denoiser whose logits hash the visible context, and which checks that the sampler keeps the protocol.

    The cache of a row is a chain of hashes, one link for each committed block: like keys under the block-causal rule, a
    link depends on its block and all earlier ones. Committing a block twice or with a mask in it, leaving one out, and
    asking for a block whose past is not committed are AssertionErrors.

    Attributes:
        vocab_size: V.
        block_size: b.
        mask_token_id: never proposed, never committed.
        params: temperature and filters of the proposals.
        forbidden: tokens that are never proposed, the mask token aside.
        sharpness: logits lie in ``[-sharpness, sharpness)``, before ``bias``.
        bias: ``[V]``, added to all logits, e.g. to make an end token likely.
        seed: another seed is another network.
        prefills: every call of ``prefill``.
        forwards: every call of ``propose``.
        chains: the cache, by slot; a query from position 0 on begins a new chain.
    """

    vocab_size: int
    block_size: int
    mask_token_id: int
    params: SamplingParams = field(default_factory=SamplingParams)
    forbidden: tuple[int, ...] = ()
    sharpness: float = 6.0
    bias: Tensor | None = None
    seed: int = 0
    prefills: list[Call] = field(default_factory=list)
    forwards: list[Call] = field(default_factory=list)
    chains: dict[int, list[int]] = field(default_factory=dict)

    @property
    def forbidden_mask(self) -> Tensor:
        """Tokens that are never proposed, bool ``[V]``."""
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        mask[[self.mask_token_id, *self.forbidden]] = True
        return mask

    def prefill(self, query: Query) -> None:
        """Commit whole prompt blocks."""
        self.prefills.append(Call.of(query))
        for row, tokens, positions in queries(self.prefills[-1]):
            self.chains.pop(row, None)
            assert positions[0] == 0, f"slot {row} was prefilled from {positions[0]} on"
            for start in range(0, len(tokens), self.block_size):
                self._commit(row, tokens[start : start + self.block_size], positions[start : start + self.block_size])

    def propose(self, query: Query) -> Proposal:
        """Commit the pending blocks and propose tokens for the last b columns."""
        assert query.uniform is not None
        self.forwards.append(Call.of(query))
        logits = []
        for row, tokens, positions in queries(self.forwards[-1]):
            if not tokens:  # the row is finished, and what is proposed for it is not read
                logits.append(torch.zeros(self.block_size, self.vocab_size))
                continue
            block, at = tokens[-self.block_size :], positions[-self.block_size :]
            if positions[0] == 0:
                self.chains.pop(row, None)
            if len(tokens) > self.block_size:
                self._commit(row, tokens[: -self.block_size], positions[: -self.block_size])
            chain = self.chains.get(row, [])
            assert at == self._next_positions(chain), f"row {row} asks for {at} after {len(chain)} committed blocks"
            logits.append(self._block_logits(chain[-1] if chain else 0, block, at[0]))
        return propose(torch.stack(logits), query.uniform, self.params, self.forbidden_mask, LocalVocab())

    def logits(self, token_ids: list[int], start: int) -> Tensor:
        """Logits ``[b, V]`` of the block at ``start`` in a whole row of tokens, without a cache: the reference."""
        link = 0
        for position in range(0, start, self.block_size):
            link = self._link(link, token_ids[position : position + self.block_size])
        return self._block_logits(link, token_ids[start : start + self.block_size], start)

    def visited_states(self, row: int) -> list[tuple[int, tuple[int, ...]]]:
        """The blocks that were denoised in this row, forward by forward: absolute start and tokens."""
        return [
            (positions[-self.block_size], tuple(tokens[-self.block_size :]))
            for call in self.forwards
            for of, tokens, positions in queries(call)
            if of == row and tokens
        ]

    def _commit(self, row: int, tokens: list[int], positions: list[int]) -> None:
        chain = self.chains.setdefault(row, [])
        assert positions == self._next_positions(chain), f"row {row} commits {positions} after {len(chain)} blocks"
        assert self.mask_token_id not in tokens, f"row {row} commits a mask at {positions}"
        chain.append(self._link(chain[-1] if chain else 0, tokens))

    def _next_positions(self, chain: list[int]) -> list[int]:
        start = len(chain) * self.block_size
        return list(range(start, start + self.block_size))

    @staticmethod
    def _link(link: int, tokens: list[int]) -> int:
        return hash((link, *tokens))  # integers hash the same in every process

    def _block_logits(self, link: int, block: list[int], start: int) -> Tensor:
        visible = torch.tensor(self._link(link, block))
        positions = torch.arange(start, start + self.block_size)[:, None]
        noise = uniform(self.seed, Stream.EVALUATION, 0, visible, positions, torch.arange(self.vocab_size))
        logits = self.sharpness * (2 * noise - 1)
        return logits if self.bias is None else logits + self.bias


def queries(call: Call) -> list[tuple[int, list[int], list[int]]]:
    """Row, tokens and positions of each query, without its invalid places."""
    return [
        (int(row), tokens[valid].tolist(), positions[valid].tolist())
        for row, tokens, positions, valid in zip(call.rows, call.token_ids, call.position_ids, call.valid, strict=True)
    ]
