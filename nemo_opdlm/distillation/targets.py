"""Which row of the teacher is the target of which position: logits at i - 1 are the target of position i."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opdlm.distillation._checks import check


@dataclass(frozen=True)
class TargetIndex:
    """Teacher targets of a batch of rollouts, packed: one row per response token, rollout after rollout.

    prompt_len, response_len int64 [B]. Rollout b owns rows `first_row[b] .. first_row[b] + R_b - 1`; the row of
    position i (absolute, P <= i < P + R) is made from the teacher's output at i - 1, so the first one comes from the
    last prompt token. One causal pass over `[prompt | response]` therefore serves every state of a rollout. Raises
    ValueError for an empty prompt, whose first response token would have no target.
    """

    prompt_len: Tensor
    response_len: Tensor

    def __post_init__(self) -> None:
        """Refuse lengths that have no target."""
        same_shape = self.prompt_len.dim() == 1 and self.prompt_len.shape == self.response_len.shape
        check("prompt_len.shape", tuple(self.prompt_len.shape), same_shape, "[B], as response_len")
        for key, value in (("prompt_len", self.prompt_len), ("response_len", self.response_len)):
            check(key, value.tolist(), bool((value >= 1).all()), "at least 1 token in every row")

    @property
    def first_row(self) -> Tensor:
        """First packed row of each rollout, int64 [B]."""
        return self.response_len.cumsum(0) - self.response_len

    def teacher_positions(self) -> tuple[Tensor, Tensor]:
        """Where the teacher's outputs stand, in packed order: (rollout, position i - 1), int64 [sum R] each."""
        rollout = torch.arange(len(self.response_len), device=self.response_len.device)
        rollout = rollout.repeat_interleave(self.response_len)
        offset = torch.arange(len(rollout), device=rollout.device) - self.first_row[rollout]
        return rollout, self.prompt_len[rollout] + offset - 1

    def gather(self, teacher_output: Tensor) -> Tensor:
        """Pack per-position teacher outputs [B, N, ...] over `[prompt | response]` into rows [sum R, ...]."""
        return teacher_output[self.teacher_positions()]

    def gather_packed(self, teacher_output: Tensor) -> Tensor:
        """The same from one row [1, N, ...] in which the rollouts `[prompt | response]` stand one behind the other."""
        rollout, position = self.teacher_positions()
        length = self.prompt_len + self.response_len
        first_column = length.cumsum(0) - length
        return teacher_output[0, first_column[rollout] + position]

    def rows(self, rollout: Tensor, position: Tensor) -> Tensor:
        """Packed row of each (rollout, absolute position), same shape. State copies share their rollout's rows."""
        offset = position - self.prompt_len[rollout]
        is_response = (offset >= 0) & (offset < self.response_len[rollout])
        assert bool(is_response.all()), "only response positions have targets"
        return self.first_row[rollout] + offset
