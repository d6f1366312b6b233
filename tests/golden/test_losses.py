"""Losses and gradient norms of fixed networks on fixed rollouts, as they were when this file was last made on purpose.

A refactor must not move them. After an intended change: ``python -m tests.golden.test_losses``, and say why in the commit.
"""

import json
from pathlib import Path

import pytest
import torch

from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.diffusion.state_selection import StateSelection, select_states
from nemo_opdlm.distillation.divergence import DivergenceKind, DivergenceSpec, Tail
from nemo_opdlm.distillation.loss import Normalization
from nemo_opdlm.megatron.forward import forward_backward
from nemo_opdlm.megatron.head import LMHead
from nemo_opdlm.megatron.optimizer import wrap
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.step import distillation_loss, micro_batches
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.trajectories import MASK_TOKEN_ID, random_trajectory

GOLDEN = Path(__file__).with_name("losses.json")
DIVERGENCES = {
    "forward_kl": DivergenceSpec(),
    "reverse_kl": DivergenceSpec(DivergenceKind.reverse_kl),
    "mixed": DivergenceSpec(DivergenceKind.mixed, reverse_weight=0.3),
    "jsd": DivergenceSpec(DivergenceKind.jsd, jsd_alpha=0.4),
    "nll": DivergenceSpec(DivergenceKind.nll),
    "tail_bucket": DivergenceSpec(top_k=4),
    "partial": DivergenceSpec(top_k=4, tail=Tail.partial),
    "renormalize": DivergenceSpec(top_k=4, tail=Tail.renormalize),
}
CASES = [
    f"{divergence}/{selection.value}/{normalization.value}"
    for divergence in DIVERGENCES
    for selection in StateSelection
    for normalization in Normalization
]
SETTINGS = tiny.optimizer_settings(clip_grad=0.0)


def measure(case: str) -> dict[str, float]:
    """Loss and global gradient norm of one update on rollouts by a network of hashes."""
    divergence, selection, normalization = case.split("/")
    parallel, spec = initialize(), DIVERGENCES[divergence]
    student = tiny.random_network(tiny.architecture(), parallel, seed=0)
    teacher = Teacher(tiny.architecture(), parallel, ModelOptions(), micro_batch_size=4)
    source = tiny.random_network(tiny.architecture(), parallel, AttentionRule.CAUSAL, seed=1)
    teacher.network.load_state_dict(source.state_dict())
    trajectory = random_trajectory(num_rows=8, block_size=4)
    states = select_states(selection, trajectory, MASK_TOKEN_ID, num_states=2, seed=0, step=1)
    network, rows = wrap(student, SETTINGS), torch.arange(len(trajectory))
    parts = micro_batches(trajectory, states, teacher.targets(trajectory, spec), rows, Normalization(normalization), 3)
    network.zero_grad_buffer()
    sums = forward_backward(network, parts, distillation_loss(LMHead(student), spec))
    loss = sum(float(part["loss_sum"]) for part in sums) / sum(float(part["count"]) for part in sums)
    norm = sum(float(parameter.main_grad.double().pow(2).sum()) for parameter in student.parameters()) ** 0.5
    return {"loss": loss, "grad_norm": norm}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradient_norms_have_not_moved(case: str) -> None:
    assert measure(case) == pytest.approx(json.loads(GOLDEN.read_text())[case], rel=2e-5)


if __name__ == "__main__":
    found = {case: {name: float(f"{value:.7g}") for name, value in measure(case).items()} for case in CASES}
    GOLDEN.write_text(json.dumps(found, indent=2) + "\n")
