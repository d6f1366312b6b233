"""How supervised tokens are weighed: sum of weight * divergence, divided by ONE count over the global batch."""

from enum import StrEnum

import torch
from torch import Tensor

from nemo_opdlm.distillation._checks import check, member


class Normalization(StrEnum):
    """`sequence`: every state copy weighs the same (the paper's recipe). `token`: every supervised token does."""

    sequence = "sequence"
    token = "token"


def token_weights(loss_mask: Tensor, num_states: Tensor, normalization: Normalization) -> tuple[Tensor, Tensor]:
    """Weights of supervised positions, and this batch's share of the global count.

    loss_mask bool [B, C, L]; num_states int64 [B], the copies in use per rollout (the first of the C). Returns weights
    fp32 [B, C, L], 0 outside the mask, and an int64 scalar. Sum the counts over micro-batches and data-parallel ranks
    BEFORE the backward pass and divide by the total: the loss then does not depend on how the batch was cut. With
    `sequence` a copy without any supervised position adds nothing but is counted.
    """
    normalization = member(Normalization, "normalization", normalization)
    check("loss_mask.shape", tuple(loss_mask.shape), loss_mask.dim() == 3, "[B, C, L]")
    check("num_states.shape", tuple(num_states.shape), num_states.shape == loss_mask.shape[:1], "[B] as loss_mask")
    weights = loss_mask.to(torch.float32)
    supervised = loss_mask.sum(-1, keepdim=True)
    if normalization == Normalization.token:
        return weights, supervised.sum()
    return weights / supervised.clamp(min=1), num_states.sum()
