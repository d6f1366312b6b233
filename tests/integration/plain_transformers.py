"""Block diffusion with nothing but transformers: what an engine that reads an exported folder has to do."""

import torch
from torch import Tensor
from transformers import PreTrainedModel


@torch.no_grad()
def block_logits(model: PreTrainedModel, token_ids: Tensor, block_size: int) -> Tensor:
    """Logits ``[b, V]`` of the last block of a row ``[L]`` in which every token sees its own block and the ones before it."""
    blocks = torch.arange(len(token_ids)) // block_size
    may_attend = blocks[None, :] <= blocks[:, None]
    mask = torch.zeros(may_attend.shape).masked_fill(~may_attend, torch.finfo(torch.float32).min)
    output = model(token_ids[None], attention_mask=mask[None, None], logits_to_keep=block_size)
    logits: Tensor = output.logits[0].float()
    return logits


def decode(
    model: PreTrainedModel, prompt: Tensor, block_size: int, mask_id: int, length: int, threshold: float
) -> Tensor:
    """``length`` greedy tokens behind ``prompt [P]``: each forward reveals what is above ``threshold``, at least one."""
    row = torch.cat([prompt, torch.full((length + -(len(prompt) + length) % block_size,), mask_id)])
    for start in range(len(prompt) // block_size * block_size, len(row), block_size):
        block = row[start : start + block_size]
        while (block == mask_id).any():
            logits = block_logits(model, row[: start + block_size], block_size)
            logits[:, mask_id] = float("-inf")
            confidence, token_ids = logits.softmax(-1).max(-1)
            confidence = confidence.masked_fill(block != mask_id, -1.0)
            reveal = (confidence > threshold) | (confidence == confidence.max())
            block[reveal] = token_ids[reveal]
    return row[len(prompt) : len(prompt) + length]
