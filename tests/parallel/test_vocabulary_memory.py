"""A whole update on a vocabulary shard: rollout, teacher and student never hold logits of all tokens."""

import warnings

import pytest
import torch

from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.diffusion.state_selection import select_states
from nemo_opdlm.distillation.divergence import DivergenceKind, DivergenceSpec, Tail
from nemo_opdlm.distillation.loss import Normalization
from nemo_opdlm.megatron import parallel
from nemo_opdlm.megatron.forward import forward_backward
from nemo_opdlm.megatron.optimizer import wrap
from nemo_opdlm.megatron.rollout import RolloutEngine
from nemo_opdlm.megatron.step import distillation_loss, micro_batches
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.memory import AllocationProfile
from nemo_opdlm.testing.ranks import Ranks

#: No other size of the network comes near it. Padded to 2 x 1,010.
VOCAB_SIZE = 2019
ROWS = 6


def shapes_of_an_update(kind: str, top_k: int, tail: str, sampling: SamplingParams) -> tuple[set[tuple[int, ...]], int]:
    """Shapes of all tensors that this rank allocates in an update at TP2, and the number of supervised tokens."""
    parallel.destroy()
    context = parallel.initialize(tensor_model_parallel_size=2)
    arch = tiny.architecture(vocab_size=VOCAB_SIZE)
    network = wrap(tiny.random_network(arch, context), tiny.optimizer_settings())
    teacher = Teacher(arch, context, ModelOptions(initialize=False), micro_batch_size=ROWS)
    teacher.network.load_state_dict(tiny.random_network(arch, context, AttentionRule.CAUSAL, seed=1).state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = DivergenceSpec(DivergenceKind(kind), top_k=top_k, tail=Tail(tail))
    remasking = RemaskingParams(RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC, threshold=0.9)
    settings = RolloutSettings(4, 4, remasking, VOCAB_SIZE - 1, (1,), seed=0, step=1)
    forbidden = torch.arange(VOCAB_SIZE) == VOCAB_SIZE - 1
    prompt_len = torch.arange(1, ROWS + 1)
    prompt_ids = torch.randint(2, VOCAB_SIZE - 1, (ROWS, ROWS), generator=torch.Generator().manual_seed(0))
    requests = Requests(prompt_ids, prompt_len, torch.full_like(prompt_len, 12), prompt_len)
    with AllocationProfile() as profile:
        trajectory = RolloutEngine(network.model, sampling, forbidden, ROWS).generate(requests, settings)
        states = select_states(
            "one_state_per_block", trajectory, VOCAB_SIZE - 1, num_states=1, seed=0, step=1, exclude_end_token=False
        )
        targets = teacher.targets(trajectory, spec)
        batches = micro_batches(trajectory, states, targets, torch.arange(ROWS), Normalization.token, ROWS)
        network.zero_grad_buffer()
        forward_backward(network, batches, distillation_loss(network.head, spec))
    return profile.shapes, int(states.loss_mask.sum())


@pytest.mark.parametrize(
    ("kind", "top_k", "tail", "sampling"),
    [
        ("forward_kl", 0, "tail_bucket", SamplingParams()),
        ("jsd", 0, "tail_bucket", SamplingParams(0.0)),
        ("reverse_kl", 16, "tail_bucket", SamplingParams(0.7, 50, 0.9)),
        ("mixed", 16, "partial", SamplingParams(1.0, 0, 0.9)),
        ("forward_kl", 16, "renormalize", SamplingParams()),
        ("nll", 0, "tail_bucket", SamplingParams()),
    ],
)
def test_no_rank_ever_holds_logits_of_the_whole_vocabulary(
    kind: str, top_k: int, tail: str, sampling: SamplingParams, two_ranks: Ranks
) -> None:
    for shapes, num_tokens in two_ranks.run(shapes_of_an_update, kind, top_k, tail, sampling):
        rows_of_logits = [shape for shape in shapes if len(shape) == 2 and shape[1] == (VOCAB_SIZE + 1) // 2]
        assert rows_of_logits, "the profile saw no logits at all"
        # A vocabulary by itself is no logits: which tokens are forbidden is known of all of them. Nor are flat buffers of
        # gradients, which are smaller than the logits of this batch would be.
        whole = [shape for shape in shapes if len(shape) > 1 and max(shape) >= VOCAB_SIZE]
        flat = [shape for shape in shapes if len(shape) == 1 and shape[0] >= num_tokens * VOCAB_SIZE]
        assert not whole and not flat and num_tokens > 30, (whole, flat, num_tokens)
