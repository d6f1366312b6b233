"""The arms of the training benchmark: our update and the published one, over the same weights."""

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from nemo_opdlm.benchmark.training_reference import ReferenceUpdate
from nemo_opdlm.benchmark.training_workload import TrainingBatch
from nemo_opdlm.benchmark.workload import Subject
from nemo_opdlm.config import Architecture
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.distillation.divergence import DivergenceSpec
from nemo_opdlm.distillation.loss import Normalization
from nemo_opdlm.megatron.forward import RowSplit, forward_backward
from nemo_opdlm.megatron.network import Network
from nemo_opdlm.megatron.optimizer import OptimizerSettings, StudentOptimizer, wrap
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.step import distillation_loss, micro_batches, total
from nemo_opdlm.megatron.student import ModelOptions, build_model
from nemo_opdlm.megatron.teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The paper's: forward KL over the whole vocabulary.
SPEC = DivergenceSpec()
#: Recompute every layer.
_FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
#: All of AdamW's work, and the same weights for the next run.
_ADAM = OptimizerSettings(
    lr=0.0,
    min_lr=0.0,
    weight_decay=0.0,
    betas=(0.9, 0.999),
    eps=1e-8,
    clip_grad=1.0,
    decoupled_weight_decay=True,
    distributed=False,
    decay_style="constant",
    warmup_steps=0,
    decay_steps=1,
)


@dataclass(frozen=True)
class OurUpdate:
    """An update as the trainer makes it, rollouts packed end to end.

    Attributes:
        network: the student.
        optimizer: AdamW at a learning rate of 0.
        teacher: frozen, with the student's first weights.
        pack_to_tokens: of a micro-batch; a longer rollout gets one of its own length.
    """

    network: Network
    optimizer: StudentOptimizer
    teacher: Teacher
    pack_to_tokens: int

    def run(self, batch: TrainingBatch) -> float:
        """A whole update; its loss."""
        loss = self.gradients(batch)
        self.optimizer.step()
        return loss

    def gradients(self, batch: TrainingBatch) -> float:
        """The update without its last step."""
        model = self.network.model
        targets = self.teacher.targets(batch.trajectory, SPEC)
        parts = micro_batches(
            batch.trajectory,
            batch.states,
            targets,
            torch.arange(len(batch.trajectory), device=model.parallel.device),
            Normalization.sequence,
            1,
            RowSplit.over_context(model),
            pack_to_tokens=max(self.pack_to_tokens, batch.longest_row),
        )
        self.optimizer.zero_grad()
        sums = total(forward_backward(self.network, parts, distillation_loss(self.network.head, SPEC)), model.parallel)
        return sums["loss_sum"] / sums["count"]


@dataclass(frozen=True)
class Arms:
    """Both updates of one model.

    Attributes:
        arch: the model.
        ours: Megatron's.
        reference: Hugging Face's.
    """

    arch: Architecture
    ours: OurUpdate
    reference: ReferenceUpdate

    @staticmethod
    def of(subject: Subject, pack_to_tokens: int, num_layers: int | None = None) -> "Arms":
        """Of the whole model, or of its first layers; the subject's weights are copied for ours only."""
        source = subject.generator.network
        arch = source.arch if num_layers is None else replace(source.arch, num_layers=num_layers)
        parallel, weights = initialize(), source[0].state_dict()
        options = ModelOptions(initialize=False, transformer_config=_FULL_RECOMPUTE)
        student = build_model(arch, parallel, AttentionRule.BLOCK_DIFFUSION, options)
        teacher = Teacher(arch, parallel, ModelOptions(initialize=False), 1, pack_to_tokens)
        for model in (student, teacher.network):
            model[0].load_state_dict(weights, strict=False)
        network = wrap(student, _ADAM)
        ours = OurUpdate(network, StudentOptimizer(network, _ADAM), teacher, pack_to_tokens)
        return Arms(arch, ours, ReferenceUpdate.of(_first_layers(subject.reference, num_layers)))


def _first_layers(model: "PreTrainedModel", num_layers: int | None) -> "PreTrainedModel":
    if num_layers is None:
        return model
    model = copy.deepcopy(model)
    model.model.layers = model.model.layers[:num_layers]
    model.config.num_hidden_layers = num_layers
    return model
