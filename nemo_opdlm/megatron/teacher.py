"""The frozen autoregressive teacher: one causal pass per rollout batch gives the targets of every state and update of it."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from nemo_opdlm.config import Architecture
from nemo_opdlm.diffusion.layout import clean_rows
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.distillation.divergence import (
    DivergenceKind,
    DivergenceSpec,
    FullTarget,
    Target,
    TokenTarget,
    TopKTarget,
    top_k_target,
)
from nemo_opdlm.distillation.targets import TargetIndex
from nemo_opdlm.megatron.forward import MicroBatch, forward_only
from nemo_opdlm.megatron.head import LMHead
from nemo_opdlm.megatron.parallel import ParallelContext
from nemo_opdlm.megatron.student import HiddenStatesGPT, ModelOptions, build_model


class TeacherTargets(Protocol):
    """Targets of a rollout batch, made and used on the same rank; token i of the batch is its i-th real response token."""

    def at(self, tokens: Tensor) -> Target:
        """The targets of these tokens, ``[T]`` numbers of real response tokens in row-major order."""
        ...


@dataclass(frozen=True)
class HiddenTargets:
    """Full support: the teacher's last hidden states ``[sum R, hidden]``, projected again chunk by chunk."""

    head: LMHead
    hidden: Tensor

    def at(self, tokens: Tensor) -> FullTarget:
        """Teacher logits of these tokens."""
        with torch.no_grad():
            return FullTarget(self.head.logits(self.hidden[tokens]))


@dataclass(frozen=True)
class StoredTargets:
    """Targets small enough to keep: the teacher's top-k, or the response's own tokens for ``nll``."""

    stored: TopKTarget | TokenTarget

    def at(self, tokens: Tensor) -> Target:
        """Targets of these tokens."""
        return self.stored.index(tokens)


class Teacher:
    """The AR model under the causal rule: evaluation mode, no gradients, no DDP, no optimizer, in no checkpoint.

    Args:
        arch: its architecture; only the vocabulary has to agree with the student's.
        parallel: the student's groups.
        options: dtype.
        micro_batch_size: rows of one causal pass.
    """

    def __init__(
        self, arch: Architecture, parallel: ParallelContext, options: ModelOptions, micro_batch_size: int
    ) -> None:
        # Frozen weights need no fp32 master copy: what autocast would cast for every pass is held in that dtype.
        held = replace(options, params_dtype=options.autocast_dtype or options.params_dtype, autocast_dtype=None)
        self.network: HiddenStatesGPT = build_model(arch, parallel, AttentionRule.CAUSAL, held)
        self.network.eval().requires_grad_(False)
        self.head = LMHead(self.network)
        self.micro_batch_size = micro_batch_size

    @torch.no_grad()
    def targets(self, trajectory: Trajectory, spec: DivergenceSpec) -> TeacherTargets:
        """One causal pass over ``[prompt | response]``; the row of position i-1 is the target of position i."""
        if spec.kind is DivergenceKind.nll:
            return self.own_tokens(trajectory)
        hidden = self.response_hidden(trajectory)
        if spec.top_k == 0:
            return HiddenTargets(self.head, hidden)
        chunks = hidden.split(self.head.chunk_rows)
        return StoredTargets(
            TopKTarget.cat([top_k_target(self.head.logits(rows), spec.top_k, self.head.vocab) for rows in chunks])
        )

    @staticmethod
    def own_tokens(trajectory: Trajectory) -> TeacherTargets:
        """The response's own tokens, which ``nll`` teaches."""
        return StoredTargets(TokenTarget(trajectory.token_ids[trajectory.is_response]))

    @torch.no_grad()
    def response_hidden(self, trajectory: Trajectory) -> Tensor:
        """Hidden states that predict each real response token ``[sum R, hidden]``, rollout after rollout."""
        batches = []
        for rows in torch.arange(len(trajectory), device=trajectory.token_ids.device).split(self.micro_batch_size):
            part = trajectory.index(rows)
            batches.append(MicroBatch(*clean_rows(part), payload=TargetIndex(part.prompt_len, part.response_len)))
        return torch.cat(forward_only(self.network, batches, lambda hidden, batch: batch.payload.gather(hidden)))
