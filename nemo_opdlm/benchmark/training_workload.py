"""What the arms of the training benchmark are given: rollouts of chosen lengths and half-masked states of them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opdlm.diffusion.layout import row_layout
from nemo_opdlm.diffusion.masks import AttentionRule, dense
from nemo_opdlm.diffusion.state_selection import DenoisingState, one_state_per_block
from nemo_opdlm.diffusion.trajectory import NEVER_UNMASKED, FinishReason, Trajectory
from nemo_opdlm.rng import Stream, uniform


@dataclass(frozen=True)
class TrainingBatch:
    """One update's rollouts and states, the same for all arms.

    Attributes:
        trajectory: the rollouts.
        states: their half-masked states.
    """

    trajectory: Trajectory
    states: DenoisingState

    @staticmethod
    def of_lengths(
        prompt_len: Tensor,
        response_len: Tensor,
        vocab_size: int,
        mask_token_id: int,
        block_size: int,
        num_states: int = 1,
    ) -> "TrainingBatch":
        """Random tokens, revealed one by one in a random order within each block, and states that a rollout visits."""
        trajectory = _made_up(prompt_len, response_len, vocab_size, block_size)
        states = one_state_per_block(trajectory, mask_token_id, num_states=num_states, seed=0, step=1)
        return TrainingBatch(trajectory, states)

    def masked(self, share: float, mask_token_id: int) -> "TrainingBatch":
        """The same rollouts with this share of the response masked, evenly spread over each state."""
        ids = self.trajectory.token_ids
        positions = torch.arange(ids.shape[1], device=ids.device)
        draw = uniform(0, Stream.NOISE, 1, self.trajectory.sample_ids[:, None], positions)
        is_masked = (self.trajectory.is_response & (draw <= share))[:, None].expand_as(self.states.state_ids)
        state_ids = ids[:, None].expand_as(is_masked).masked_fill(is_masked, mask_token_id)
        return TrainingBatch(self.trajectory, DenoisingState(state_ids, is_masked, self.states.num_states))

    def one_state_a_row(self) -> "TrainingBatch":
        """The same states, each in a row of its own."""
        num_states = self.states.state_ids.shape[1]
        rows = torch.arange(len(self.trajectory), device=self.states.state_ids.device).repeat_interleave(num_states)
        ids, masks = self.states.state_ids.flatten(0, 1)[:, None], self.states.loss_mask.flatten(0, 1)[:, None]
        return TrainingBatch(self.trajectory.index(rows), DenoisingState(ids, masks, torch.ones_like(rows)))

    def longest_alone(self) -> "TrainingBatch":
        """The longest row with its first state."""
        number = int(row_layout(self.trajectory, self.states).row_len.argmax())
        rows = torch.tensor([number], device=self.trajectory.token_ids.device)
        batch = TrainingBatch(self.trajectory.index(rows), self.states.index(rows)).one_state_a_row()
        first = slice(0, 1)
        return TrainingBatch(batch.trajectory.index(first), batch.states.index(first))

    def to(self, device: torch.device) -> "TrainingBatch":
        """The batch on another device."""
        return TrainingBatch(self.trajectory.to(device), self.states.to(device))

    @property
    def num_useful(self) -> int:
        """Useful tokens: those of prompts, responses with their final blocks and states, each once; no padding."""
        return int(row_layout(self.trajectory, self.states).row_len.sum())

    @property
    def longest_row(self) -> int:
        """Tokens of the longest two-stream row."""
        return int(row_layout(self.trajectory, self.states).row_len.max())

    @property
    def num_teacher(self) -> int:
        """Tokens that the targets need: those of prompts and responses, each once."""
        return int((self.trajectory.prompt_len + self.trajectory.response_len).sum())

    @property
    def num_supervised(self) -> int:
        """Masked response tokens."""
        return int(self.states.loss_mask.sum())

    def num_pairs(self) -> tuple[int, int]:
        """Pairs of query and key that the student and the teacher have to look at."""
        layout, student = row_layout(self.trajectory, self.states), 0
        for row in range(len(self.trajectory)):
            of_row = layout.attributes(None).map(lambda x, r=row: x[r : r + 1, : int(layout.row_len[r])])  # type: ignore[misc]
            student += int(dense(AttentionRule.BLOCK_DIFFUSION, of_row, of_row).sum())
        lengths = self.trajectory.prompt_len + self.trajectory.response_len
        return student, int((lengths * (lengths + 1) // 2).sum())


def mixed_lengths(num_rows: int, mean: int, cap: int) -> Tensor:
    """Response lengths ``[B]`` of this mean, the longest at the cap and the others quantiles of an exponential.

    Of the 128 rollouts of a step one nearly always runs into its limit.

    Raises:
        ValueError: no such lengths.
    """
    rest = num_rows * mean - cap
    if num_rows < 2 or rest < num_rows - 1:
        raise ValueError(f"{num_rows} responses of {mean} tokens on average cannot include one of {cap}")
    quantiles = -(1 - (torch.arange(num_rows - 1) + 0.5) / (num_rows - 1)).log()
    shorter = (quantiles * rest / quantiles.sum()).round().long().clamp(1, cap)
    return torch.cat([shorter, torch.tensor([cap])])


def prompt_lengths(num_rows: int, longest: int) -> Tensor:
    """Prompt lengths ``[B]``, evenly spread from half to the whole of the longest."""
    return torch.linspace(math.ceil(longest / 2), longest, num_rows).round().long()


def _made_up(prompt_len: Tensor, response_len: Tensor, vocab_size: int, block_size: int) -> Trajectory:
    generator = torch.Generator().manual_seed(0)
    num_rows = prompt_len.numel()
    row_end = -(-(prompt_len + response_len) // block_size) * block_size
    width = int(row_end.max())
    positions = torch.arange(width)
    order = torch.rand(num_rows, width // block_size, block_size, generator=generator).argsort(-1).flatten(1)
    step = (positions // block_size * block_size + order + 1).to(torch.int32)
    step = step.masked_fill(positions < prompt_len[:, None], 0)
    step = step.masked_fill(positions >= row_end[:, None], NEVER_UNMASKED)
    return Trajectory(
        token_ids=torch.randint(vocab_size, (num_rows, width), generator=generator),
        prompt_len=prompt_len,
        response_len=response_len,
        unmask_step=step,
        confidence=torch.zeros(num_rows, width),
        finish_reason=torch.full_like(prompt_len, FinishReason.LENGTH),
        num_forwards=response_len.clone(),
        sample_ids=torch.arange(num_rows),
        block_size=block_size,
    )
