"""Responses that nothing can be learnt from: empty ones, and one token over and over."""

import torch
from torch import Tensor

from nemo_opdlm.diffusion.trajectory import FinishReason, Trajectory

#: Shorter responses may be one word said twice.
_FEWEST_REPEATED = 8


def num_content_tokens(trajectory: Trajectory) -> Tensor:
    """Tokens of each response without the one that ended it, int64 ``[B]``."""
    return trajectory.response_len - (trajectory.finish_reason == FinishReason.END_OF_TURN).long()


def is_empty(trajectory: Trajectory) -> Tensor:
    """Whether a response is its end token alone, bool ``[B]``."""
    return num_content_tokens(trajectory) == 0


def is_repeated(trajectory: Trajectory) -> Tensor:
    """Whether a response of at least 8 tokens is one token throughout, its end token aside, bool ``[B]``."""
    content_len, start = num_content_tokens(trajectory), trajectory.prompt_len[:, None]
    positions = torch.arange(trajectory.token_ids.shape[1], device=start.device)
    is_content = (positions >= start) & (positions < start + content_len[:, None])
    first = trajectory.token_ids.gather(1, start.clamp(max=len(positions) - 1))
    return ((trajectory.token_ids == first) | ~is_content).all(-1) & (content_len >= _FEWEST_REPEATED)
