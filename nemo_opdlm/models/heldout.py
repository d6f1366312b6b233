"""The held-out divergence: one fixed set of half-masked states, comparable over time and not gamed by degenerate text."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.settings import RolloutProgress, RolloutSettings
from nemo_opdlm.diffusion.state_selection import DenoisingState, random_mask
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.distillation.divergence import DivergenceSpec
from nemo_opdlm.megatron.exchange import respond_together
from nemo_opdlm.megatron.rollout import RolloutEngine
from nemo_opdlm.megatron.step import divergence_sums, total
from nemo_opdlm.megatron.student import StagedGPT
from nemo_opdlm.megatron.teacher import Teacher, TeacherTargets

#: Always the full forward KL, whatever the run trains on.
HELDOUT_DIVERGENCE = DivergenceSpec()


@dataclass(frozen=True)
class HeldoutSet:
    """The teacher's own answers to held-out prompts, randomly masked once, and the teacher's targets on them.

    Attributes:
        trajectory, states: the whole set, on every rank.
        share: the part of it that this data-parallel rank judges; None where there are more ranks than answers.
        targets: the teacher's, of the share.
    """

    trajectory: Trajectory
    states: DenoisingState
    share: tuple[Trajectory, DenoisingState] | None
    targets: TeacherTargets | None

    @staticmethod
    def build(
        teacher: Teacher,
        engine: RolloutEngine,
        requests: Requests,
        settings: RolloutSettings,
        on_progress: Callable[[RolloutProgress], None] | None = None,
    ) -> "HeldoutSet":
        """Sample the teacher at temperature 1 and mask each block with its own t ~ U(0, 1); every rank calls this.

        Args:
            teacher: gives the targets.
            engine: decodes with the teacher's network.
            requests: held-out prompts.
            settings: block size, mask and end tokens; its seed and step make the set reproducible.
            on_progress: told how far the answers are.
        """
        parallel = teacher.network.parallel

        def respond(rows: torch.Tensor) -> Trajectory:
            return engine.generate_autoregressive(requests.index(rows), settings, on_progress)

        trajectory = respond_together(respond, requests.max_new_tokens, parallel)
        states = random_mask(trajectory, settings.mask_token_id, num_states=1, seed=settings.seed, step=settings.step)
        return HeldoutSet.of(teacher, trajectory, states)

    @staticmethod
    def of(teacher: Teacher, trajectory: Trajectory, states: DenoisingState) -> "HeldoutSet":
        """The set of these states, which every rank holds; every rank calls this."""
        parallel = teacher.network.parallel
        mine = torch.arange(len(trajectory), device=parallel.device)[parallel.dp_rank :: parallel.dp_size]
        if mine.numel() == 0:
            return HeldoutSet(trajectory, states, None, None)
        share = trajectory.index(mine), states.index(mine)
        return HeldoutSet(trajectory, states, share, teacher.targets(share[0], HELDOUT_DIVERGENCE))

    @property
    def checksum(self) -> str:
        """SHA-256 of tokens and masks: equal where two figures may be compared."""
        digest = hashlib.sha256()
        for tensor in (self.trajectory.token_ids, self.trajectory.response_len, self.states.loss_mask):
            digest.update(tensor.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def divergence(self, student: StagedGPT, micro_batch_size: int) -> float:
        """Forward KL(teacher || student) in nats, mean over the masked tokens of the set; every rank calls this."""
        was_training = student.training
        student.eval()
        try:
            sums = total(self._sums(student, micro_batch_size), student.parallel)
        finally:
            student.train(was_training)
        return sums["divergence_sum"] / sums["num_tokens"]

    def _sums(self, student: StagedGPT, micro_batch_size: int) -> list[dict[str, torch.Tensor]]:
        if self.share is None or self.targets is None:
            return []
        trajectory, states = self.share
        parallel = student.parallel
        # Context-parallel ranks, which share these answers, judge different ones.
        rows = torch.arange(len(trajectory), device=parallel.device)[parallel.cp_rank :: parallel.cp_size]
        return divergence_sums(student, trajectory, states, self.targets, rows, HELDOUT_DIVERGENCE, micro_batch_size)
