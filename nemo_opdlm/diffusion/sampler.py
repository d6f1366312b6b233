"""Rollout: block by block, and inside a block denoising step by denoising step."""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_opdlm.diffusion.proposal import Proposal
from nemo_opdlm.diffusion.remasking import RemaskingParams, positions_to_reveal, quota
from nemo_opdlm.diffusion.trajectory import NEVER_UNMASKED, FinishReason, Trajectory
from nemo_opdlm.rng import Stream, uniform

_PAD = 0


class Denoiser(Protocol):
    """A network with a cache of keys and values, as the sampler sees it: tokens in, proposals out, never logits.

    ``slots [A]`` are the cache slots that take part, in rising order; ``valid [A, Q]`` says which places of the query hold
    a token. Every query token sees its slot's cache before its block, and its own block. A query from position 0 on
    begins a new row in its slot: what the slot held is never seen again.
    """

    def prefill(self, slots: Tensor, token_ids: Tensor, position_ids: Tensor, valid: Tensor) -> None:
        """Write the keys and values of whole prompt blocks ``[A, Q]`` under the block-causal rule."""
        ...

    def propose(
        self, slots: Tensor, token_ids: Tensor, position_ids: Tensor, valid: Tensor, uniform: Tensor
    ) -> Proposal:
        """Propose tokens for a block, ``[A, b]``; read at its masks only.

        The query ``[A, Q]`` ends with the block. With Q = 2b it opens with the finished block before it, whose keys
        and values this forward also writes (rows without one are not ``valid`` there).
        """
        ...


class Query(NamedTuple):
    """What the sampler asks of the network: a prefill where ``uniform`` is None, else proposals (see `Denoiser`)."""

    slots: Tensor
    token_ids: Tensor
    position_ids: Tensor
    valid: Tensor
    uniform: Tensor | None


class RolloutProgress(TypedDict):
    """State of a rollout in plain integers: batched forwards so far, open rows, rows, tokens in finished blocks."""

    num_forwards: int
    num_active: int
    num_rows: int
    num_tokens: int


@dataclass(frozen=True)
class RolloutSettings:
    """How a batch is rolled out; raises ValueError outside the ranges.

    Attributes:
        block_size: b.
        denoising_steps: S, most denoising steps of a block; at least 1.
        remasking: which positions a step reveals.
        mask_token_id: stands at positions that are not revealed yet.
        end_token_ids: tokens that end a response.
        seed: the run's seed.
        step: rollout step, part of the key of all randomness.
    """

    block_size: int
    denoising_steps: int
    remasking: RemaskingParams
    mask_token_id: int
    end_token_ids: tuple[int, ...]
    seed: int
    step: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("block_size", "denoising_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; allowed: at least 1")
        if self.mask_token_id in self.end_token_ids:
            raise ValueError(f"mask_token_id={self.mask_token_id} is also an end token; allowed: any other token")


def rollout(
    denoiser: Denoiser,
    prompt_ids: Tensor,
    prompt_len: Tensor,
    max_new_tokens: Tensor,
    sample_ids: Tensor,
    settings: RolloutSettings,
    on_progress: Callable[[RolloutProgress], None] | None = None,
    num_slots: int | None = None,
) -> Trajectory:
    """Answer prompts with one network that answers at once; see `decode` for the arguments."""
    steps = decode(prompt_ids, prompt_len, max_new_tokens, sample_ids, settings, on_progress, num_slots)
    answer: Proposal | None = None
    while True:
        try:
            query = steps.send(answer)
        except StopIteration as end:
            trajectory: Trajectory = end.value
            return trajectory
        if query.uniform is None:
            denoiser.prefill(*query[:-1])
            answer = None
        else:
            answer = denoiser.propose(*query[:-1], query.uniform)


def decode(
    prompt_ids: Tensor,
    prompt_len: Tensor,
    max_new_tokens: Tensor,
    sample_ids: Tensor,
    settings: RolloutSettings,
    on_progress: Callable[[RolloutProgress], None] | None = None,
    num_slots: int | None = None,
) -> Generator[Query, Proposal | None, Trajectory]:
    """Answer prompts. A row's answer does not depend on the rows beside it, nor on their order or slot.

    A row that is finished hands its slot to the next prompt, so that the batch stays full until prompts run out. Rows go
    through their blocks independently; every forward denoises one block of each row that has a slot, and the first forward
    of a block also commits the block before it, so no forward is spent on the cache alone (but for prompts longer than a
    block) and none follows a row's last block. The device is read once per forward.

    Written as a coroutine, so that a pipeline can keep the queries of several batches in flight: it yields what it asks
    of the network and is sent the proposals (None after a prefill).

    Args:
        prompt_ids: int64 ``[B, Lp]``, padded on the right.
        prompt_len: int64 ``[B]``, at least 1.
        max_new_tokens: int64 ``[B]``, at least 1; a response of that length has no end token added.
        sample_ids: int64 ``[B]``, keys of the randomness.
        settings: how to decode.
        on_progress: called before each forward and once at the end.
        num_slots: rows that are decoded at a time, those of the cache; None for all of them.
    """
    canvas = _Canvas(prompt_ids, prompt_len, max_new_tokens, sample_ids, settings, on_progress, num_slots)
    while (blocks := canvas.open_blocks()) is not None:
        prefill = canvas.prefill(blocks)
        if prefill is not None:
            yield prefill
        masked = canvas.unmask_step[blocks.places] == NEVER_UNMASKED
        proposal = yield canvas.query(blocks)
        assert proposal is not None
        reveal = positions_to_reveal(
            settings.remasking, proposal, masked, canvas.quota(blocks), canvas.uniform(Stream.REMASKING, blocks)
        )
        canvas.reveal(blocks, reveal, proposal)
        canvas.advance(blocks, is_complete=~(masked & ~reveal).any(-1))
    return canvas.trajectory()


@dataclass(frozen=True)
class _Blocks:
    """The blocks ``[A, b]`` that one forward denoises, one in each occupied slot.

    Attributes:
        rows, slots: int64 ``[A]``, in the order of the slots.
        positions: int64 ``[A, b]``.
        is_new: bool ``[A]``, rows that have just got their slot; on the CPU.
        any_pending: whether any row has a finished block that is not cached yet.
    """

    rows: Tensor
    slots: Tensor
    positions: Tensor
    is_new: Tensor
    any_pending: bool

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Index of the blocks in the canvas."""
        return self.rows[:, None], self.positions


class _Canvas:
    """The rows while they are written: prompt, decoded blocks, masks, on absolute positions ``[B, L]``."""

    def __init__(
        self,
        prompt_ids: Tensor,
        prompt_len: Tensor,
        max_new_tokens: Tensor,
        sample_ids: Tensor,
        settings: RolloutSettings,
        on_progress: Callable[[RolloutProgress], None] | None,
        num_slots: int | None,
    ) -> None:
        _check_lengths(prompt_ids, prompt_len, max_new_tokens)
        self.settings = settings
        self.on_progress = on_progress
        num_rows = prompt_len.numel()
        # What the host has to know to hand out slots: the row in each of them (-1: none) and the first row without one.
        self._row_of_slot = torch.full((min(num_slots or num_rows, num_rows),), -1)
        self._next_row = 0
        self._num_forwards = self._num_tokens_of_finished = 0
        self._starts_pending = (prompt_len >= self.settings.block_size).cpu()
        self.block_size = settings.block_size
        self.prompt_len = prompt_len
        self.limit_end = prompt_len + max_new_tokens
        self.sample_ids = sample_ids
        length = -(-int(self.limit_end.max()) // self.block_size) * self.block_size
        in_prompt = torch.arange(length, device=prompt_ids.device) < prompt_len[:, None]
        prompt_ids = F.pad(prompt_ids, (0, length - prompt_ids.shape[1]))
        self.token_ids = prompt_ids.masked_fill(~in_prompt, settings.mask_token_id)
        # What may be written is decided by this record, never by comparing ids: a prompt may hold any token.
        self.unmask_step = torch.full_like(self.token_ids, NEVER_UNMASKED, dtype=torch.int32).masked_fill(in_prompt, 0)
        self.confidence = torch.zeros_like(self.token_ids, dtype=torch.float32)
        self.block_start = prompt_len - prompt_len % self.block_size
        self.has_pending = self.block_start > 0
        self.denoising_step = torch.zeros_like(prompt_len)
        self.num_forwards = torch.zeros_like(prompt_len)
        self.response_len = torch.zeros_like(prompt_len)
        self.finish_reason = torch.zeros_like(prompt_len)
        self.offsets = torch.arange(self.block_size, device=prompt_ids.device)
        self.quotas = quota(self.block_size, settings.denoising_steps).to(prompt_ids.device)
        self.end_token_ids = torch.tensor(settings.end_token_ids, dtype=torch.int64, device=prompt_ids.device)

    def prefill(self, blocks: _Blocks) -> Query | None:
        """The whole prompt blocks of new rows but the last, which is committed by the first denoising forward."""
        if not bool(blocks.is_new.any()):
            return None
        new = blocks.is_new.nonzero()[:, 0].to(blocks.rows.device)
        rows, slots = blocks.rows[new], blocks.slots[new]
        prefill_len = self.block_start[rows] - self.block_size
        longer = (prefill_len > 0).nonzero()[:, 0]
        if longer.numel() == 0:
            return None
        rows, slots, prefill_len = rows[longer], slots[longer], prefill_len[longer]
        width = int(prefill_len.max())
        positions = torch.arange(width, device=rows.device).expand(rows.numel(), -1)
        return Query(slots, self.token_ids[rows, :width], positions, positions < prefill_len[:, None], None)

    def open_blocks(self) -> _Blocks | None:
        """The blocks to denoise now, None when every row is finished; reads the device once."""
        slots = (self._row_of_slot >= 0).nonzero()[:, 0]
        any_pending, num_tokens = self._read(slots)
        is_new = self._fill_slots()
        slots = (self._row_of_slot >= 0).nonzero()[:, 0]
        rows = self._row_of_slot[slots]
        if self.on_progress is not None:
            waiting = self.prompt_len.numel() - self._next_row
            self.on_progress(
                RolloutProgress(
                    num_forwards=self._num_forwards,
                    num_active=rows.numel() + waiting,
                    num_rows=self.prompt_len.numel(),
                    num_tokens=self._num_tokens_of_finished + num_tokens,
                )
            )
        if rows.numel() == 0:
            return None
        self._num_forwards += 1
        device = self.token_ids.device
        is_new = is_new[slots]
        any_pending = any_pending or bool(self._starts_pending[rows[is_new]].any())
        rows = rows.to(device)
        self.num_forwards[rows] += 1
        return _Blocks(rows, slots.to(device), self.block_start[rows, None] + self.offsets, is_new, any_pending)

    def _read(self, slots: Tensor) -> tuple[bool, int]:
        """Free the slots of finished rows; whether any other row has a pending block, and how many tokens they have."""
        if slots.numel() == 0:
            return False, 0
        rows = self._row_of_slot[slots].to(self.token_ids.device)
        num_tokens = (self.block_start - self.prompt_len).clamp(min=0)
        status = [self.response_len == 0, self.has_pending, self.denoising_step, num_tokens]
        is_open, has_pending, denoising_step, num_tokens = torch.stack([x[rows].long() for x in status]).cpu()
        is_open = is_open.bool()
        assert bool((denoising_step[is_open] < self.settings.denoising_steps).all()), "the quotas left a mask behind"
        self._row_of_slot[slots[~is_open]] = -1
        self._num_tokens_of_finished += int(num_tokens[~is_open].sum())
        return bool(has_pending[is_open].any()), int(num_tokens[is_open].sum())

    def _fill_slots(self) -> Tensor:
        """Give free slots to the next rows; which slots were given, bool ``[S]``."""
        is_free = self._row_of_slot < 0
        free = is_free.nonzero()[: self.prompt_len.numel() - self._next_row, 0]
        self._row_of_slot[free] = torch.arange(self._next_row, self._next_row + free.numel())
        self._next_row += free.numel()
        return is_free & (self._row_of_slot >= 0)

    def query(self, blocks: _Blocks) -> Query:
        """``[pending | block]``, or the blocks alone where nothing is pending."""
        rows, positions = blocks.rows, blocks.positions
        valid = torch.ones_like(positions, dtype=torch.bool)
        if blocks.any_pending:
            valid = torch.cat([valid & self.has_pending[rows, None], valid], 1)
            positions = torch.cat([(positions - self.block_size).clamp(min=0), positions], 1)
        uniform = self.uniform(Stream.PROPOSAL, blocks)
        return Query(blocks.slots, self.token_ids[rows[:, None], positions], positions, valid, uniform)

    def uniform(self, stream: Stream, blocks: _Blocks) -> Tensor:
        """Random numbers ``[A, b]`` of this forward, keyed by sample, position and the row's own count of forwards."""
        samples, forwards = self.sample_ids[blocks.rows, None], self.num_forwards[blocks.rows, None]
        return uniform(self.settings.seed, stream, self.settings.step, samples, blocks.positions, forwards)

    def quota(self, blocks: _Blocks) -> Tensor:
        """n_s of each row's denoising step, ``[A]``."""
        return self.quotas[self.denoising_step[blocks.rows]]

    def reveal(self, blocks: _Blocks, reveal: Tensor, proposal: Proposal) -> None:
        """Write the proposed tokens at the revealed positions, and when and how surely they were revealed."""
        forwards = self.num_forwards[blocks.rows, None].to(torch.int32)
        for canvas, new in (
            (self.token_ids, proposal.token_ids),
            (self.unmask_step, forwards),
            (self.confidence, proposal.confidence),
        ):
            canvas[blocks.places] = torch.where(reveal, new, canvas[blocks.places])

    def advance(self, blocks: _Blocks, is_complete: Tensor) -> None:
        """Go on to the next denoising step, or to the next block; a row ends at its first end token or its limit."""
        rows, positions = blocks.rows, blocks.positions
        start, limit_end = self.prompt_len[rows], self.limit_end[rows]
        may_end = (positions >= start[:, None]) & (positions < limit_end[:, None])
        is_end = may_end & torch.isin(self.token_ids[blocks.places], self.end_token_ids)
        has_end = is_end.any(-1)
        first_end = positions[:, 0] + is_end.to(torch.uint8).argmax(-1)
        response_end = torch.where(has_end, first_end + 1, limit_end)
        is_finished = is_complete & (has_end | (positions[:, -1] >= limit_end - 1))
        self.response_len[rows] = torch.where(is_finished, response_end - start, 0)
        self.finish_reason[rows] = torch.where(has_end, int(FinishReason.END_OF_TURN), int(FinishReason.LENGTH))
        self.block_start[rows] += self.block_size * is_complete
        self.has_pending[rows] = is_complete
        self.denoising_step[rows] = torch.where(is_complete, 0, self.denoising_step[rows] + 1)

    def trajectory(self) -> Trajectory:
        """The finished record, cut to the longest row."""
        row_end = self.block_start  # every row has advanced past its final block
        width = int(row_end.max())
        beyond = torch.arange(width, device=row_end.device) >= row_end[:, None]
        return Trajectory(
            token_ids=self.token_ids[:, :width].masked_fill(beyond, _PAD),
            prompt_len=self.prompt_len,
            response_len=self.response_len,
            unmask_step=self.unmask_step[:, :width],
            confidence=self.confidence[:, :width],
            finish_reason=self.finish_reason,
            num_forwards=self.num_forwards,
            sample_ids=self.sample_ids,
            block_size=self.block_size,
        )


def _check_lengths(prompt_ids: Tensor, prompt_len: Tensor, max_new_tokens: Tensor) -> None:
    fits = (prompt_len >= 1) & (prompt_len <= prompt_ids.shape[1]) & (max_new_tokens >= 1)
    if prompt_len.numel() == 0 or not bool(fits.all()):
        raise ValueError(
            f"prompt_len={prompt_len.tolist()} and max_new_tokens={max_new_tokens.tolist()}; allowed: at least one "
            f"row, prompts of 1 to {prompt_ids.shape[1]} tokens, and at least 1 new token"
        )
