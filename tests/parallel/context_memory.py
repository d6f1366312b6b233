"""One update of a random network on one long row: what the ranks of `test_context_memory` run."""

import time

import torch

from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.diffusion.state_selection import random_mask
from nemo_opdlm.diffusion.trajectory import NEVER_UNMASKED, FinishReason, Trajectory
from nemo_opdlm.distillation.divergence import DivergenceKind, DivergenceSpec
from nemo_opdlm.distillation.loss import Normalization
from nemo_opdlm.megatron import parallel
from nemo_opdlm.megatron.forward import RowSplit, forward_backward
from nemo_opdlm.megatron.optimizer import wrap
from nemo_opdlm.megatron.step import distillation_loss, micro_batches
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.memory import AllocationProfile

BLOCK_SIZE = 4


def long_trajectory(length: int, vocab_size: int) -> Trajectory:
    """One response of ``length`` tokens to a prompt of one block, revealed from left to right."""
    generator = torch.Generator().manual_seed(0)
    total = BLOCK_SIZE + length
    steps = (torch.arange(total) - BLOCK_SIZE + 1).clamp(min=0).to(torch.int32)
    assert total % BLOCK_SIZE == 0 and total < NEVER_UNMASKED
    return Trajectory(
        token_ids=torch.randint(vocab_size - 1, (1, total), generator=generator),
        prompt_len=torch.tensor([BLOCK_SIZE]),
        response_len=torch.tensor([length]),
        unmask_step=steps[None],
        confidence=torch.zeros(1, total),
        finish_reason=torch.tensor([int(FinishReason.LENGTH)]),
        num_forwards=torch.tensor([length]),
        sample_ids=torch.tensor([0]),
        block_size=BLOCK_SIZE,
    )


def update(length: int, context_size: int) -> tuple[int, float, float]:
    """Forward and backward pass of a row of about 2 x ``length`` tokens: peak bytes, loss, seconds."""
    parallel.destroy()
    context = parallel.initialize(context_parallel_size=context_size)
    arch = tiny.architecture(
        hidden_size=128,
        ffn_hidden_size=344,
        num_attention_heads=2,
        num_query_groups=1,
        kv_channels=64,
        vocab_size=256,
        max_position_embeddings=2 * length,
    )
    network = wrap(tiny.random_network(arch, context, AttentionRule.BLOCK_DIFFUSION), tiny.optimizer_settings())
    trajectory = long_trajectory(length, arch.vocab_size)
    states = random_mask(trajectory, arch.vocab_size - 1, num_states=1, seed=1, step=1)
    spec = DivergenceSpec(DivergenceKind.nll)
    split = RowSplit.over_context(network.model)
    rows, targets = torch.arange(1), Teacher.own_tokens(trajectory)
    batches = micro_batches(trajectory, states, targets, rows, Normalization.token, 1, split)
    network.zero_grad_buffer()
    start = time.perf_counter()
    with AllocationProfile() as profile:
        sums = forward_backward(network, batches, distillation_loss(network.head, spec))
    seconds = time.perf_counter() - start
    loss = context.sum_over_data(sums[0]["loss_sum"])
    return profile.peak_bytes, float(loss), seconds
