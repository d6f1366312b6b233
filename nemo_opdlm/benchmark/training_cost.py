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
from nemo_opdlm.testing.memory import AllocationProfile

#: Layers of the two networks that the cost of a whole one is extrapolated from.
FEW_LAYERS = (2, 3)


@dataclass(frozen=True)
class Cost:
    """Of the forward and backward passes of an update.

    Attributes:
        flops: of matrix products and attention.
        peak_bytes: most memory beside weights, gradients and the optimizer's state.
    """

    flops: float
    peak_bytes: float

    @staticmethod
    def count(run: Callable[[], object]) -> "Cost":
        """Watch a call; slow."""
        with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter, AllocationProfile() as memory:
            run()
        return Cost(counter.get_total_flops(), memory.peak_bytes)

    def with_layers(self, one_more: "Cost", num_layers: int) -> "Cost":
        """Of a network with so many layers more, given the cost with one more: every layer adds the same."""
        return Cost(
            self.flops + num_layers * (one_more.flops - self.flops),
            self.peak_bytes + num_layers * (one_more.peak_bytes - self.peak_bytes),
        )


def costs(subject: Subject, batch: TrainingBatch, pack_to_tokens: int) -> dict[str, Cost]:
    """Cost of both arms.

    FLOPs grow by the same with every layer. So does the peak of long rows: it is reached before the second layer from the
    end is computed again, when the inputs of all layers are kept.
    """
    num_layers, found = subject.generator.network.arch.num_layers, []
    # All published rows are as long as the longest and go one by one.
    longest, num_rows = batch.longest_alone(), int(batch.states.num_states.sum())
    for few in FEW_LAYERS:
        arms = Arms.of(subject, pack_to_tokens, few)
        ours = Cost.count(lambda a=arms: a.ours.gradients(batch))  # type: ignore[misc]
        row = Cost.count(lambda a=arms: a.reference.gradients(longest))  # type: ignore[misc]
        found.append({"ours": ours, "reference": Cost(num_rows * row.flops, row.peak_bytes)})
    two, three = found
    return {name: two[name].with_layers(three[name], num_layers - FEW_LAYERS[0]) for name in two}


def needed_flops(arch: Architecture, batch: TrainingBatch) -> float:
    """FLOPs of an update that computes nothing twice and nothing that does not reach the loss.

    The student's layers see every useful token, forward and twice as much backward, the teacher's those of prompt and
    response; attention the pairs that the rule allows; both heads the masked tokens.
    """
    query, key = arch.num_attention_heads * arch.kv_channels, arch.num_query_groups * arch.kv_channels
    layer = arch.hidden_size * (2 * query + 2 * key + 3 * arch.ffn_hidden_size)
    student_pairs, teacher_pairs = batch.num_pairs()
    layers = arch.num_layers * layer * (3 * batch.num_useful + batch.num_teacher)
    attention = arch.num_layers * 2 * query * (3 * student_pairs + teacher_pairs)
    head = arch.vocab_size * arch.hidden_size * (3 + 1) * batch.num_supervised
    return 2.0 * (layers + attention + head)


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
        losses.loss_sum.backward()  # type: ignore[no-untyped-call]

    def peak_bytes(self) -> int:
        """Most memory of a first run beside the gradients, which are no working memory."""
        with AllocationProfile() as memory:
            self.run()
        return memory.peak_bytes - 4 * (self.head.model.head_weight().numel() + self.hidden.numel())


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    rows, heads, num_queries, width = query
    return int(2 * 2 * rows * heads * num_queries * key[-2] * width)


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    # Scores once more, and two products for each of the two of the forward pass.
    return _attention_flops(query, key, value) * 5 // 2


_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}
