"""What an update costs beside time, counted operator by operator, and what it could not do without."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nemo_opdlm.benchmark.training_arms import SPEC, Arms
from nemo_opdlm.benchmark.training_workload import TrainingBatch
from nemo_opdlm.benchmark.workload import Subject
from nemo_opdlm.config import Architecture
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.megatron.head import LMHead, token_losses
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import ModelOptions, build_model
from nemo_opdlm.megatron.teacher import HiddenTargets
from nemo_opdlm.models.flops import forward_flops
from nemo_opdlm.testing.memory import AllocationProfile

#: Layers of the two networks that the cost of a whole one is extrapolated from.
FEW_LAYERS = (2, 3)


def flops(subject: Subject, batch: TrainingBatch, pack_to_tokens: int) -> dict[str, float]:
    """FLOPs of matrix products and attention in the forward and backward passes of both arms' updates.

    Every layer adds as many, so that two networks of a few layers tell those of the whole one.
    """
    num_layers, found = subject.generator.network.arch.num_layers, []
    # All published rows are as long as the longest and go one by one.
    longest, num_rows = batch.longest_alone(), int(batch.states.num_states.sum())
    for few in FEW_LAYERS:
        arms = Arms.of(subject, pack_to_tokens, few)
        ours, row = _counted(arms.ours.gradients, batch), _counted(arms.reference.gradients, longest)
        found.append({"ours": ours, "reference": num_rows * row})
    two, three = found
    return {name: two[name] + (num_layers - FEW_LAYERS[0]) * (three[name] - two[name]) for name in two}


def _counted(run: Callable[[TrainingBatch], object], batch: TrainingBatch) -> float:
    with FlopCounterMode(display=False, custom_mapping=UNKNOWN_TO_TORCH) as counter:
        run(batch)
    return float(counter.get_total_flops())


def peak_bytes(run: Callable[[], object]) -> int:
    """Most memory of a call beside what is there before it; for an update's passes: beside weights, gradients and optimizer."""
    memory = AllocationProfile()
    with memory:
        run()
    return memory.peak_bytes


def needed_flops(arch: Architecture, batch: TrainingBatch) -> float:
    """FLOPs of an update that computes nothing twice and nothing that does not reach the loss.

    The student's layers see every useful token, forward and twice as much backward, the teacher's those of prompt and
    response; attention the pairs that the rule allows; both heads the masked tokens.
    """
    student_pairs, teacher_pairs = batch.num_pairs()
    student = forward_flops(arch, (batch.num_useful, student_pairs, batch.num_supervised))
    return 3 * student + forward_flops(arch, (batch.num_teacher, teacher_pairs, batch.num_supervised))


@dataclass(frozen=True)
class HeadLoss:
    """Our LM head and loss, forward and backward, apart from the layers.

    Attributes:
        head: at some vocabulary.
        hidden: hidden states ``[T, hidden]`` of the masked tokens.
        targets: the teacher's.
    """

    head: LMHead
    hidden: Tensor
    targets: HiddenTargets

    @staticmethod
    def of(arch: Architecture, vocab_size: int, num_tokens: int) -> "HeadLoss":
        """With random weights."""
        tied = replace(arch, vocab_size=vocab_size, num_layers=1, share_embeddings_and_output_weights=True)
        head = LMHead(build_model(tied, initialize(), AttentionRule.CAUSAL, ModelOptions()))
        hidden = torch.randn(num_tokens, arch.hidden_size, device=head.model.head_weight().device, requires_grad=True)
        return HeadLoss(head, hidden, HiddenTargets(head, torch.randn_like(hidden).detach()))

    def run(self) -> None:
        """Gradients of the loss."""
        rows = torch.arange(len(self.hidden), device=self.hidden.device)
        weights = torch.ones(len(self.hidden), device=self.hidden.device)
        losses = token_losses(self.head, self.hidden, lambda a, b: self.targets.at(rows[a:b]), SPEC, weights)
        losses.loss_sum.backward()

    def peak_bytes(self) -> int:
        """Most memory of a first run beside the gradients, which are no working memory."""
        return peak_bytes(self.run) - 4 * (self.head.model.head_weight().numel() + self.hidden.numel())


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    rows, heads, num_queries, width = query
    return int(2 * 2 * rows * heads * num_queries * key[-2] * width)


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    # Scores once more, and two products for each of the two of the forward pass.
    return _attention_flops(query, key, value) * 5 // 2


def _added_product_flops(total: Any, left: Any, right: Any, *_: Any, **__: Any) -> int:
    return int(2 * left[0] * left[1] * right[1])


#: Operators that torch has no formula for: attention on a CPU, and products that are added in place, as of weight gradients.
UNKNOWN_TO_TORCH = {
    torch.ops.aten.addmm_: _added_product_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
