"""Self-speculative decoding: a network drafts by the block and judges its drafts under the causal rule, in one forward."""

from collections.abc import Callable, Generator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_opdlm.diffusion.canvas import Blocks, Canvas
from nemo_opdlm.diffusion.denoiser import Query
from nemo_opdlm.diffusion.proposal import Proposal
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.settings import RolloutProgress, RolloutSettings
from nemo_opdlm.diffusion.trajectory import NEVER_UNMASKED, FinishReason, Trajectory
from nemo_opdlm.rng import Stream, uniform


def speculate(
    requests: Requests,
    settings: RolloutSettings,
    on_progress: Callable[[RolloutProgress], None] | None = None,
    num_slots: int | None = None,
    late_reads: bool = False,
) -> Generator[Query, Proposal | None, Trajectory]:
    """Answer prompts as causal decoding does, token for token, in fewer forwards; arguments and contract of `decode`.

    A row's query ``[A, 2b]`` is ``[pending | drafts | masks]``: the last written token, whose keys are not cached yet, up to
    b - 1 drafts of the tokens after it, and b masks, where the row's limit leaves room for them. Pending token and drafts
    attend causally, so their keys may stay; masks attend to all that stands before them and to each other.

    The answer ``[A, 2b - 1]`` proposes tokens for the positions after the pending one: the pending token and each draft
    propose the token after them, all masks but the first the token at their own place. The first proposals are therefore
    those of causal decoding as long as the drafts before them agree with them: these are written, one at least. If all drafts
    agree, the masks stood behind what was written, and their proposals are the next drafts; else the next forward has none.

    A proposal is drawn with the random number that causal decoding takes at its position. So the responses are equal at any
    temperature and under any filter, and a draft shares its number with the proposal that judges it. Equal means up to
    rounding: a network may round otherwise where it takes more tokens at a time, as it may in another batch.

    A response of R tokens takes R forwards at most, if every draft is wrong, and 1 + ceil((R - 1) / b) if every one is right.
    The network must never propose the mask token. ``unmask_step`` counts forwards; remasking and denoising steps have no part
    in this.
    """
    canvas = _SpeculativeCanvas(requests, settings, on_progress, num_slots, late_reads)
    while (blocks := canvas.open_blocks()) is not None:
        prefill = canvas.prefill(blocks)
        if prefill is not None:
            yield prefill
        proposal = yield canvas.query(blocks)
        assert proposal is not None
        canvas.accept(blocks, proposal)
        canvas.tell(blocks)
    return canvas.trajectory().with_block_size(settings.block_size)


class _SpeculativeCanvas(Canvas):
    """Rows that are written from left to right, in blocks of one token; after a row's written tokens stand its drafts."""

    def __init__(
        self,
        requests: Requests,
        settings: RolloutSettings,
        on_progress: Callable[[RolloutProgress], None] | None,
        num_slots: int | None,
        late_reads: bool,
    ) -> None:
        one_by_one = replace(settings, block_size=1, denoising_steps=1)
        super().__init__(requests, one_by_one, on_progress, num_slots, late_reads)
        self.draft_size = settings.block_size
        self.num_drafts = torch.zeros_like(self.prompt_len)
        self.columns = torch.arange(2 * self.draft_size, device=self.device)
        # The last columns of a query may stand past the longest row.
        margin = (0, 2 * self.draft_size)
        self.token_ids = F.pad(self.token_ids, margin)
        self.unmask_step = F.pad(self.unmask_step, margin, value=NEVER_UNMASKED)
        self.confidence = F.pad(self.confidence, margin)

    def num_keys(self, start: int) -> int:
        """End of a query whose pending token stands before ``start``, or of the next one."""
        return self.rounded_keys(start + self.draft_size * (3 if self.late_reads else 2))

    def query(self, blocks: Blocks) -> Query:
        """``[pending | drafts | masks]``, without what the limit cuts off or no draft stands for."""
        rows = blocks.rows[:, None]
        positions = blocks.positions - 1 + self.columns
        is_mask = self.columns > self.num_drafts[rows]
        token_ids = self.token_ids[rows, positions].masked_fill(is_mask, self.settings.mask_token_id)
        # A draft of the last token a row may have would save nothing: the token before it proposes the last one.
        is_of_use = (positions < self.limit_end[rows] - 1) & (self.columns <= self.num_drafts[rows] + self.draft_size)
        uniform = self.causal_uniform(rows, positions[:, 1:])
        positions = torch.where(is_of_use, positions, -1)
        valid = torch.ones(positions.shape, dtype=torch.bool) if self.late_reads else is_of_use.cpu()
        return Query(blocks.slots, token_ids, positions, valid, blocks.num_keys, uniform)

    def causal_uniform(self, rows: Tensor, positions: Tensor) -> Tensor:
        """The random numbers of causal decoding, whose n-th forward proposes the n-th token of a response."""
        forwards = positions - self.prompt_len[rows] + 1
        settings, samples = self.settings, self.sample_ids[rows]
        return uniform(settings.seed, Stream.PROPOSAL, settings.step, samples, positions, forwards)

    def accept(self, blocks: Blocks, proposal: Proposal) -> None:
        """Write what causal decoding would have written, up to an end token or the limit, and keep drafts that follow it."""
        rows, offsets = blocks.rows, self.columns[:-1]
        places = rows[:, None], blocks.positions + offsets
        num_drafts = self.num_drafts[rows, None]
        agrees = (self.token_ids[places] == proposal.token_ids) & (offsets < num_drafts)
        num_accepted = agrees.cumprod(-1).sum(-1, keepdim=True)
        is_end = (offsets <= num_accepted) & torch.isin(proposal.token_ids, self.end_token_ids)
        has_end = is_end.any(-1)
        num_written = torch.where(has_end, is_end.to(torch.uint8).argmax(-1), num_accepted[:, 0]) + 1
        num_written *= self.response_len[rows] == 0
        is_written = offsets < num_written[:, None]
        forwards = self.num_forwards[rows, None].to(torch.int32)
        self.token_ids[places] = proposal.token_ids  # behind what is written stand drafts, or what nobody reads
        self.unmask_step[places] = torch.where(is_written, forwards, self.unmask_step[places])
        self.confidence[places] = torch.where(is_written, proposal.confidence, self.confidence[places])
        is_draft = (offsets > num_drafts) & (offsets < num_drafts + self.draft_size)
        is_draft &= (num_accepted == num_drafts) & (places[1] < self.limit_end[rows, None] - 1)
        self.num_drafts[rows] = is_draft.sum(-1)
        self.advance_by(rows, num_written, has_end)

    def advance_by(self, rows: Tensor, num_written: Tensor, has_end: Tensor) -> None:
        """Go on behind the written tokens; a row ends at its first end token or its limit."""
        self.block_start[rows] += num_written
        end = self.block_start[rows]
        is_finished = (num_written > 0) & (has_end | (end == self.limit_end[rows]))
        self.response_len[rows] += torch.where(is_finished, end - self.prompt_len[rows], 0)
        reason = torch.where(has_end, int(FinishReason.END_OF_TURN), int(FinishReason.LENGTH))
        self.finish_reason[rows] = torch.where(num_written > 0, reason, self.finish_reason[rows])
