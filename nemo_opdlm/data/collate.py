"""Prompts of different lengths as one right-padded batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


def collate(prompts: Sequence[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Stack prompts (int64 [P_i] each) into prompt_ids int64 [B, max P] and prompt_len int64 [B].

    Lengths are explicit, so a prompt may contain `pad_id`. Raises ValueError for no prompts or an empty one.
    """
    if not prompts or not all(prompt.numel() for prompt in prompts):
        raise ValueError("cannot collate an empty list of prompts or an empty prompt")
    prompt_len = torch.tensor([prompt.numel() for prompt in prompts])
    return pad_sequence(list(prompts), batch_first=True, padding_value=pad_id), prompt_len
