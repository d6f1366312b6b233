"""What passes through a network in rollouts, teacher passes and training: tokens, pairs and logits, counted by closed forms.

Every token counts that the method asks for, and none that it does not: no padding, nothing computed twice.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opdlm.diffusion.layout import row_layout
from nemo_opdlm.diffusion.state_selection import DenoisingState
from nemo_opdlm.diffusion.trajectory import NEVER_UNMASKED, Trajectory


@dataclass(frozen=True)
class Work:
    """Work of B rollouts, int64 ``[B]`` each.

    Attributes:
        num_tokens: tokens that go through the layers.
        num_pairs: pairs of query and key that attention looks at.
        num_logits: tokens that go through the LM head.
    """

    num_tokens: Tensor
    num_pairs: Tensor
    num_logits: Tensor

    def __add__(self, other: "Work") -> "Work":
        """Both."""
        return Work(
            self.num_tokens + other.num_tokens, self.num_pairs + other.num_pairs, self.num_logits + other.num_logits
        )

    def stack(self) -> Tensor:
        """One tensor ``[3, B]``, to be summed and read at once."""
        return torch.stack([self.num_tokens, self.num_pairs, self.num_logits])


def causal_work(lengths: Tensor, num_logits: Tensor) -> Work:
    """One causal pass over rows of ``lengths``, or the same from left to right with a cache."""
    return Work(lengths, lengths * (lengths + 1) // 2, num_logits)


def training_work(trajectory: Trajectory, states: DenoisingState, has_causal_copy: bool = False) -> Work:
    """One forward pass over two-stream rows; the masked tokens reach the LM head, and the response of a causal copy."""
    layout, b = row_layout(trajectory, states), trajectory.block_size
    first, last = layout.prefix_len // b, (layout.prefix_len + layout.stream_len) // b
    # A token of block k, clean or of a state, sees the k whole blocks up to its own: b * b * k pairs a block.
    clean = b * b * last * (last + 1) // 2
    state = clean - b * b * first * (first + 1) // 2
    rows = Work(layout.row_len, clean + layout.num_states * state, states.loss_mask.sum((1, 2)))
    if not has_causal_copy:
        return rows
    return rows + causal_work(trajectory.prompt_len + trajectory.response_len, trajectory.response_len)


def rollout_work(trajectory: Trajectory) -> Work:
    """Block-diffusion decoding with a cache: every forward denoises one block, and all blocks but a row's last are committed.

    A block's token reaches the LM head in each forward in which it is masked.
    """
    b, num_blocks = trajectory.block_size, trajectory.row_end // trajectory.block_size
    step = trajectory.unmask_step.masked_fill(trajectory.unmask_step == NEVER_UNMASKED, 0).long().unflatten(1, (-1, b))
    #: Number of the forward that finished each block ``[B, L / b]``; that of the block before, where there was none.
    finished = step.amax(-1).cummax(1).values
    begun = torch.nn.functional.pad(finished, (1, -1))
    number = torch.arange(1, finished.shape[1] + 1, device=finished.device)
    committed = num_blocks * (num_blocks - 1) // 2 * b * b
    return Work(
        trajectory.num_forwards * b + (num_blocks - 1) * b,
        ((finished - begun) * number).sum(1) * b * b + committed,
        ((step - begun[..., None]) * (step > 0)).sum((1, 2)),
    )
