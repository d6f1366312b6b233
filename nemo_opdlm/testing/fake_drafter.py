"""A network of hashes that drafts, as well as it is told to, and judges its drafts."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_opdlm.diffusion.denoiser import Query
from nemo_opdlm.diffusion.proposal import Proposal, propose
from nemo_opdlm.rng import Stream, uniform
from nemo_opdlm.testing.fake_denoiser import Call, FakeDenoiser, queries
from nemo_opdlm.vocab import LocalVocab


@dataclass
class FakeDrafter(FakeDenoiser):
    """Answers the queries of `speculate`; in blocks of one token it is the causal network whose text is drafted.

    The chain of a slot has a link for each cached causal token. Those at and after a query's first position are overwritten;
    a gap before it, a mask among the causal tokens and a query that is out of order are AssertionErrors.

    Attributes:
        skill: share of the drafts that are what causal decoding would write, as if all drafts before them held.
    """

    skill: float = 0.5

    def propose(self, query: Query) -> Proposal:
        """Propose the token after each causal token, and the tokens at all masks but the first, ``[A, 2b - 1]``."""
        assert self.block_size == 1, "the cache is causal"
        assert query.uniform is not None
        self.forwards.append(Call.of(query))
        width = query.uniform.shape[1]
        answers = []
        for (slot, tokens, positions), numbers in zip(queries(self.forwards[-1]), query.uniform, strict=True):
            if not tokens:  # of a row that is finished, of which the sampler has not heard
                answers.append(torch.zeros(width, self.vocab_size))
                continue
            start = positions[0]
            assert positions == list(range(start, start + len(positions))), f"slot {slot} asks for {positions}"
            is_mask = [column > 0 and token == self.mask_token_id for column, token in enumerate(tokens)]
            num_causal = len(tokens) - sum(is_mask)
            assert not any(is_mask[:num_causal]), f"slot {slot} has masks before other tokens"
            logits = self._causal_logits(slot, tokens[:num_causal], start)
            logits += self._draft_logits(
                self.chains[slot], len(tokens) - num_causal - 1, logits[-1], numbers[num_causal - 1 :]
            )
            answers.append(F.pad(torch.stack(logits), (0, 0, 0, width - len(logits))))
        return propose(torch.stack(answers), query.uniform, self.params, self.forbidden_mask, LocalVocab())

    def drafts_rightly(self, token_ids: Sequence[int]) -> bool:
        """Whether its draft of the token after these is the one that causal decoding writes there."""
        link = 0
        for token in token_ids:
            link = self._link(link, [token])
        return self._drafts_rightly(link, len(token_ids))

    def _causal_logits(self, slot: int, tokens: Sequence[int], start: int) -> list[Tensor]:
        """Cache the tokens; the logits of the position after each of them."""
        chain = self.chains.setdefault(slot, [])
        assert start <= len(chain), f"slot {slot} asks for position {start} after {len(chain)} cached ones"
        del chain[start:]
        logits = []
        for token in tokens:
            chain.append(self._link(chain[-1] if chain else 0, [token]))
            logits.append(self._next_logits(chain[-1], len(chain)))
        return logits

    def _draft_logits(self, chain: Sequence[int], num_drafts: int, logits: Tensor, numbers: Tensor) -> list[Tensor]:
        """Logits of the drafts after a position whose causal logits are given, by going on as causal decoding would."""
        link, drafts = chain[-1], []
        for number in range(num_drafts):
            token = int(self._draw(logits, numbers[number]))
            link, position = self._link(link, [token]), len(chain) + number + 1
            logits = self._next_logits(link, position)
            is_right = self._drafts_rightly(link, position)
            drafts.append(logits if is_right else self._anything_but(self._draw(logits, numbers[number + 1])))
        return drafts

    def _drafts_rightly(self, link: int, position: int) -> bool:
        return bool(uniform(self.seed, Stream.EVALUATION, 1, torch.tensor(link), position) < self.skill)

    def _anything_but(self, token_id: Tensor) -> Tensor:
        """Logits that are sure of another token."""
        allowed = (~self.forbidden_mask).index_fill(0, token_id, False)
        return F.one_hot(allowed.nonzero()[0, 0], self.vocab_size) * 1000.0

    def _next_logits(self, link: int, position: int) -> Tensor:
        return self._block_logits(link, [self.mask_token_id], position)[0]

    def _draw(self, logits: Tensor, number: Tensor) -> Tensor:
        return propose(logits, number, self.params, self.forbidden_mask, LocalVocab()).token_ids
