"""The frozen autoregressive teacher: one causal pass per rollout batch gives the targets of every state and update of it."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from nemo_opdlm.config import Architecture
from nemo_opdlm.diffusion.layout import clean_rows, packed_clean_rows
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.diffusion.packing import pack
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
        pack_to_tokens: None, or tokens of one causal pass over rollouts end to end; a longer rollout gets one of its own.
    """

    def __init__(
        self,
        arch: Architecture,
        parallel: ParallelContext,
        options: ModelOptions,
        micro_batch_size: int,
        pack_to_tokens: int | None = None,
    ) -> None:
        # Frozen weights need no fp32 master copy: what autocast would cast for every pass is held in that dtype.
        held = replace(options, params_dtype=options.autocast_dtype or options.params_dtype, autocast_dtype=None)
        self._hold(build_model(arch, parallel, AttentionRule.CAUSAL, held), micro_batch_size, pack_to_tokens)

    @classmethod
    def around(cls, network: StagedGPT, micro_batch_size: int) -> "Teacher":
        """The teacher that a network with the causal rule is, with the weights it holds; it is frozen."""
        teacher = cls.__new__(cls)
        teacher._hold(network, micro_batch_size, None)
        return teacher

    def _hold(self, network: StagedGPT, micro_batch_size: int, pack_to_tokens: int | None) -> None:
        self.network: StagedGPT = network
        self.network.eval().requires_grad_(False)
        self.head = LMHead(self.network)
        self.micro_batch_size = micro_batch_size
        self.pack_to_tokens = pack_to_tokens

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
        chunks = hidden.split(self.head.chunk_rows(spec))
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
        device = self.network.parallel.device
        nothing = torch.empty(
            0, self.network.config.hidden_size, dtype=self.network.config.pipeline_dtype, device=device
        )
        mine = trajectory.index(torch.arange(len(trajectory), device=device)[rollouts])
        if len(mine) == 0:
            return nothing
        passes = self._passes(mine)
        batches = [self._micro_batch(mine.index(rows)) for rows in passes]
        gather = TargetIndex.gather if self.pack_to_tokens is None else TargetIndex.gather_packed
        with self.network.on_device():
            parts = forward_only(self.network, batches, lambda hidden, batch: gather(batch.payload, hidden))
        return _in_order(torch.cat(parts), torch.cat(passes), mine.response_len) if parts else nothing

    def _passes(self, trajectory: Trajectory) -> list[Tensor]:
        """Which rollouts share a pass."""
        if self.pack_to_tokens is None:
            return list(torch.arange(len(trajectory), device=trajectory.token_ids.device).split(self.micro_batch_size))
        lengths = trajectory.prompt_len + trajectory.response_len
        return pack(lengths, max(self.pack_to_tokens, int(lengths.max())))

    def _micro_batch(self, trajectory: Trajectory) -> MicroBatch:
        lay_out = clean_rows if self.pack_to_tokens is None else packed_clean_rows
        index = TargetIndex(trajectory.prompt_len, trajectory.response_len)
        return MicroBatch(*lay_out(trajectory, RowSplit.whole(self.network).multiple_of), payload=index)


def _in_order(values: Tensor, order: Tensor, response_len: Tensor) -> Tensor:
    """Values of each response token ``[sum R, ...]`` of the rollouts ``order [B]``, put in the order of the rollouts."""
    tokens = torch.arange(values.shape[0], device=values.device).split(response_len.tolist())
    return values[torch.cat([tokens[rollout] for rollout in order.tolist()]).argsort()]
