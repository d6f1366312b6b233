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
from nemo_opdlm.megatron.exchange import gather_responses
from nemo_opdlm.megatron.forward import MicroBatch, RowSplit, forward_only
from nemo_opdlm.megatron.head import LMHead
from nemo_opdlm.megatron.parallel import ParallelContext
from nemo_opdlm.megatron.student import ModelOptions, StagedGPT, build_model


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
        """Teacher logits of these tokens, in the teacher's precision whatever the student's autocast."""
        with torch.no_grad(), torch.autocast(self.hidden.device.type, enabled=False):
            return FullTarget(self.head.logits(self.hidden[tokens]))


class NoTargets:
    """Off the last pipeline stage, where no divergence is computed."""

    def at(self, tokens: Tensor) -> Target:
        """There are none."""
        raise AssertionError("only the last pipeline stage has targets")


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
        options: dtype, layers.
        micro_batch_size: rows of one causal pass.
    """

    def __init__(
        self, arch: Architecture, parallel: ParallelContext, options: ModelOptions, micro_batch_size: int
    ) -> None:
        # Frozen weights need no fp32 master copy: what autocast would cast for every pass is held in that dtype.
        held = replace(options, params_dtype=options.autocast_dtype or options.params_dtype, autocast_dtype=None)
        self.network: StagedGPT = build_model(arch, parallel, AttentionRule.CAUSAL, held)
        self.network.eval().requires_grad_(False)
        self.head = LMHead(self.network)
        self.micro_batch_size = micro_batch_size

    @torch.no_grad()
    def targets(self, trajectory: Trajectory, spec: DivergenceSpec) -> TeacherTargets:
        """One causal pass over ``[prompt | response]``; the row of position i-1 is the target of position i.

        Context-parallel ranks, which hold parts of the same rollouts, share out the pass and exchange its result.
        """
        if spec.kind is DivergenceKind.nll:
            return self.own_tokens(trajectory)
        parallel = self.network.parallel
        hidden = self.response_hidden(trajectory, slice(parallel.cp_rank, None, parallel.cp_size))
        if not parallel.is_last_stage:
            return NoTargets()

        def everywhere(mine: Tensor) -> Tensor:
            return gather_responses(mine, trajectory.response_len, parallel.groups.cp)

        if spec.top_k == 0:
            return HiddenTargets(self.head, everywhere(hidden))
        chunks = hidden.split(self.head.chunk_rows)
        target = TopKTarget.cat([top_k_target(self.head.logits(rows), spec.top_k, self.head.vocab) for rows in chunks])
        return StoredTargets(
            TopKTarget(everywhere(target.token_ids), everywhere(target.log_probs), everywhere(target.tail_log_prob))
        )

    @staticmethod
    def own_tokens(trajectory: Trajectory) -> TeacherTargets:
        """The response's own tokens, which ``nll`` teaches."""
        return StoredTargets(TokenTarget(trajectory.token_ids[trajectory.is_response]))

    @torch.no_grad()
    def response_hidden(self, trajectory: Trajectory, rollouts: slice = slice(None)) -> Tensor:  # noqa: B008
        """Hidden states that predict each real response token ``[sum R, hidden]`` of some rollouts, one after the other.

        On the last pipeline stage; the others get no rows.
        """
        mine = torch.arange(len(trajectory), device=trajectory.token_ids.device)[rollouts]
        multiple_of = RowSplit.whole(self.network).multiple_of
        batches = []
        for rows in mine.split(self.micro_batch_size) if mine.numel() else ():
            part = trajectory.index(rows)
            index = TargetIndex(part.prompt_len, part.response_len)
            batches.append(MicroBatch(*clean_rows(part, multiple_of), payload=index))
        with self.network.on_device():
            parts = forward_only(self.network, batches, lambda hidden, batch: batch.payload.gather(hidden))
        nothing = torch.empty(0, self.network.config.hidden_size, device=self.network.parallel.device)
        return torch.cat(parts) if parts else nothing.to(self.network.config.pipeline_dtype)
