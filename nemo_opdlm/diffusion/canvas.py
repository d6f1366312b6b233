"""The rows of a rollout while they are written, and what the host knows of them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_opdlm.diffusion.denoiser import Query
from nemo_opdlm.diffusion.proposal import Proposal
from nemo_opdlm.diffusion.remasking import quota
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.settings import RolloutProgress, RolloutSettings
from nemo_opdlm.diffusion.trajectory import NEVER_UNMASKED, FinishReason, Trajectory
from nemo_opdlm.rng import Stream, uniform

_PAD = 0
#: The number of visible keys is a multiple of it, where shapes are to be few.
_KEYS_MULTIPLE = 128


@dataclass(frozen=True)
class Blocks:
    """The blocks ``[A, b]`` that one forward denoises, one in each slot that takes part.

    Attributes:
        rows, slots: int64 ``[A]``, in the order of the slots.
        positions: int64 ``[A, b]``.
        host_rows, host_slots: rows and slots on the host.
        is_new: bool ``[A]``, rows that have just got their slot; on the host.
        is_pending: bool ``[A]``, rows that may have a finished block that is not cached yet; on the host.
        num_keys: no position of the blocks is as large.
    """

    rows: Tensor
    slots: Tensor
    positions: Tensor
    host_rows: Tensor
    host_slots: Tensor
    is_new: Tensor
    is_pending: Tensor
    num_keys: int

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Index of the blocks in the canvas."""
        return self.rows[:, None], self.positions


class Status:
    """What the host is told of rows ``[A]`` after a forward; on a GPU it does not wait for it before it reads.

    Args:
        rows, slots: of the forward, on the host.
        columns: integers of each row, ``[C, A]`` on the device.
    """

    def __init__(self, rows: Tensor, slots: Tensor, columns: Tensor) -> None:
        self.rows, self.slots = rows, slots
        self._columns, self._arrived = columns, None
        if columns.is_cuda:
            self._columns = torch.empty(columns.shape, dtype=columns.dtype, pin_memory=True)
            self._columns.copy_(columns, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Tensor:
        """The columns on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._columns


class Slots:
    """What the host knows of the slots ``[S]``: which row each of them holds, and how far that was when last heard of.

    Attributes:
        row: the row that it holds, or held.
        is_free: whether its row is finished.
        start: first position of the row's block.
        is_pending: whether the row has a finished block that is not cached yet.
    """

    def __init__(self, num_slots: int, num_rows: int) -> None:
        self.row = torch.full((num_slots,), -1)
        self.is_free = torch.ones(num_slots, dtype=torch.bool)
        self.start = torch.zeros(num_slots, dtype=torch.int64)
        self.is_pending = torch.zeros(num_slots, dtype=torch.bool)
        self.num_waiting = num_rows
        self._num_rows = num_rows

    def fill(self, starts: Tensor) -> Tensor:
        """Give free slots to the next rows, whose first blocks begin at ``starts [B]``; which were given, bool ``[S]``."""
        free = self.is_free.nonzero()[: self.num_waiting, 0]
        first = self._num_rows - self.num_waiting
        rows = torch.arange(first, first + free.numel())
        self.num_waiting -= free.numel()
        self.row[free], self.is_free[free] = rows, False
        self.start[free], self.is_pending[free] = starts[rows], starts[rows] > 0
        is_new = torch.zeros_like(self.is_free)
        is_new[free] = True
        return is_new

    def taking_part(self, in_few_sizes: bool) -> Tensor:
        """The slots that are not free; with some that are, so that their number is a halving of S, if it is to be."""
        is_free, size = self.is_free, self.is_free.numel()
        num_open = size - int(is_free.sum())
        if in_few_sizes and num_open > 0:
            while (size + 1) // 2 >= num_open and size > 1:
                size = (size + 1) // 2
            fillers = is_free.nonzero()[: size - num_open, 0]
            is_free = is_free.clone()
            is_free[fillers] = False
        return (~is_free).nonzero()[:, 0]


class Canvas:
    """The rows while they are written: prompt, decoded blocks, masks, on absolute positions ``[B, L]``."""

    def __init__(
        self,
        requests: Requests,
        settings: RolloutSettings,
        on_progress: Callable[[RolloutProgress], None] | None,
        num_slots: int | None,
        late_reads: bool,
    ) -> None:
        self.settings = settings
        self.on_progress = on_progress
        self.late_reads = late_reads
        self.slots = Slots(min(num_slots or len(requests), len(requests)), len(requests))
        self._statuses: list[Status] = []
        self._num_forwards = self._num_row_forwards = self._num_tokens_of_finished = self._num_tokens_of_open = 0
        self.block_size = settings.block_size
        self.prompt_len = prompt_len = requests.prompt_len
        self.limit_end = prompt_len + requests.max_new_tokens
        self.sample_ids = requests.sample_ids
        #: Tokens of the longest row, in whole blocks.
        self.length = length = -(-int(self.limit_end.max()) // self.block_size) * self.block_size
        prompt_ids = F.pad(requests.prompt_ids, (0, length - requests.prompt_ids.shape[1]))
        in_prompt = torch.arange(length, device=prompt_ids.device) < prompt_len[:, None]
        self.token_ids = prompt_ids.masked_fill(~in_prompt, settings.mask_token_id)
        # What may be written is decided by this record, never by comparing ids: a prompt may hold any token.
        self.unmask_step = torch.full_like(self.token_ids, NEVER_UNMASKED, dtype=torch.int32).masked_fill(in_prompt, 0)
        self.confidence = torch.zeros_like(self.token_ids, dtype=torch.float32)
        self.block_start = prompt_len - prompt_len % self.block_size
        self._first_starts = self.block_start.cpu()
        self.has_pending = self.block_start > 0
        self.denoising_step = torch.zeros_like(prompt_len)
        self.num_forwards = torch.zeros_like(prompt_len)
        self.response_len = torch.zeros_like(prompt_len)
        self.finish_reason = torch.zeros_like(prompt_len)
        self.offsets = torch.arange(self.block_size, device=prompt_ids.device)
        self.quotas = quota(self.block_size, settings.denoising_steps).to(prompt_ids.device)
        self.end_token_ids = torch.tensor(settings.end_token_ids, dtype=torch.int64, device=prompt_ids.device)

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return self.token_ids.device

    def prefill(self, blocks: Blocks) -> Query | None:
        """The whole prompt blocks of new rows but the last, which is committed by the first denoising forward."""
        prefill_len = self._first_starts[blocks.host_rows] - self.block_size
        longer = (blocks.is_new & (prefill_len > 0)).nonzero()[:, 0]
        if longer.numel() == 0:
            return None
        width = int(prefill_len[longer].max())
        valid = torch.arange(width) < prefill_len[longer, None]
        longer = longer.to(self.device)
        positions = torch.arange(width, device=self.device).expand(longer.numel(), -1)
        return Query(
            blocks.slots[longer], self.token_ids[blocks.rows[longer], :width], positions, valid, width, uniform=None
        )

    def open_blocks(self) -> Blocks | None:
        """The blocks to denoise now, None when every row is finished."""
        while len(self._statuses) > self.late_reads:
            self._take_in(self._statuses.pop(0))
        is_new = self.slots.fill(self._first_starts)
        self._report()
        host_slots = self.slots.taking_part(in_few_sizes=self.late_reads)
        if host_slots.numel() == 0:
            return None
        self._num_forwards += 1
        self._num_row_forwards += int((~self.slots.is_free).sum())
        host_rows, starts = self.slots.row[host_slots], self.slots.start[host_slots]
        on_host = torch.stack([host_rows, host_slots])
        if self.device.type == "cuda":
            on_host = on_host.pin_memory()  # a copy from other memory would wait for the forward before
        rows, slots = on_host.to(self.device, non_blocking=True)
        # A row that is finished, of which the host may not have heard, takes part in no forward.
        self.num_forwards[rows] += self.response_len[rows] == 0
        return Blocks(
            rows,
            slots,
            self.block_start[rows, None] + self.offsets,
            host_rows,
            host_slots,
            is_new[host_slots],
            self.slots.is_pending[host_slots] | self.late_reads,
            self.num_keys(int(starts.max())),
        )

    def num_keys(self, start: int) -> int:
        """End of the block at ``start``; where reads are late of the one behind it, rounded up to few sizes."""
        return self.rounded_keys(start + self.block_size * (2 if self.late_reads else 1))

    def rounded_keys(self, num_keys: int) -> int:
        """A number of keys that is one of few where reads are late, and never beyond the longest row."""
        if self.late_reads:
            num_keys = -(-num_keys // _KEYS_MULTIPLE) * _KEYS_MULTIPLE
        return min(num_keys, self.length)

    def tell(self, blocks: Blocks) -> None:
        """Send the state of the rows to the host: the one read of a forward."""
        is_open = self.response_len == 0
        num_tokens = torch.where(is_open, (self.block_start - self.prompt_len).clamp(min=0), self.response_len)
        columns = (is_open, self.has_pending, self.denoising_step, self.block_start, num_tokens)
        on_device = torch.stack([column[blocks.rows].long() for column in columns])
        self._statuses.append(Status(blocks.host_rows, blocks.host_slots, on_device))

    def _take_in(self, status: Status) -> None:
        """Free the slots of finished rows, and note how far the others are."""
        is_open, is_pending, denoising_step, start, num_tokens = status.read()
        # Rows that got their slot since are not meant, nor those whose end is known.
        is_meant = (self.slots.row[status.slots] == status.rows) & ~self.slots.is_free[status.slots]
        is_open = is_open.bool()
        assert bool((denoising_step[is_open] < self.settings.denoising_steps).all()), "the quotas left a mask behind"
        slots, is_open, start = status.slots[is_meant], is_open[is_meant], start[is_meant]
        num_tokens = num_tokens[is_meant]
        self.slots.is_free[slots[~is_open]] = True
        self.slots.start[slots], self.slots.is_pending[slots] = start, is_pending[is_meant].bool()
        self._num_tokens_of_finished += int(num_tokens[~is_open].sum())
        self._num_tokens_of_open = int(num_tokens[is_open].sum())

    def _report(self) -> None:
        if self.on_progress is not None:
            self.on_progress(
                RolloutProgress(
                    num_forwards=self._num_forwards,
                    num_row_forwards=self._num_row_forwards,
                    num_active=int((~self.slots.is_free).sum()) + self.slots.num_waiting,
                    num_rows=self.prompt_len.numel(),
                    num_tokens=self._num_tokens_of_finished + self._num_tokens_of_open,
                )
            )

    def query(self, blocks: Blocks) -> Query:
        """``[pending | block]``, or the blocks alone where nothing is pending."""
        rows, positions = blocks.rows, blocks.positions
        if self.late_reads:
            positions = torch.where(self.response_len[rows, None] == 0, positions, -1)
        valid = torch.ones(positions.shape, dtype=torch.bool)
        if bool(blocks.is_pending.any()):
            valid = torch.cat([valid & blocks.is_pending[:, None], valid], 1)
            pending = torch.where(self.has_pending[rows, None], blocks.positions - self.block_size, -1)
            positions = torch.cat([pending, positions], 1)
        token_ids = self.token_ids[rows[:, None], positions.clamp(min=0)]
        uniform = self.uniform(Stream.PROPOSAL, blocks)
        return Query(blocks.slots, token_ids, positions, valid, blocks.num_keys, uniform)

    def uniform(self, stream: Stream, blocks: Blocks) -> Tensor:
        """Random numbers ``[A, b]`` of this forward, keyed by sample, position and the row's own count of forwards."""
        samples, forwards = self.sample_ids[blocks.rows, None], self.num_forwards[blocks.rows, None]
        return uniform(self.settings.seed, stream, self.settings.step, samples, blocks.positions, forwards)

    def quota(self, blocks: Blocks) -> Tensor:
        """n_s of each row's denoising step, ``[A]``."""
        return self.quotas[self.denoising_step[blocks.rows]]

    def reveal(self, blocks: Blocks, reveal: Tensor, proposal: Proposal) -> None:
        """Write the proposed tokens at the revealed positions, and when and how surely they were revealed."""
        forwards = self.num_forwards[blocks.rows, None].to(torch.int32)
        for canvas, new in (
            (self.token_ids, proposal.token_ids),
            (self.unmask_step, forwards),
            (self.confidence, proposal.confidence),
        ):
            canvas[blocks.places] = torch.where(reveal, new, canvas[blocks.places])

    def advance(self, blocks: Blocks, is_complete: Tensor) -> None:
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
        # A finished row stays at its last block, so that a forward more, which reveals nothing, changes nothing.
        goes_on = is_complete & ~is_finished
        self.block_start[rows] += self.block_size * goes_on
        self.has_pending[rows] = goes_on
        self.denoising_step[rows] = torch.where(is_complete, 0, self.denoising_step[rows] + 1)

    def trajectory(self) -> Trajectory:
        """The finished record, cut to the longest row."""
        row_end = -(-(self.prompt_len + self.response_len) // self.block_size) * self.block_size
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
