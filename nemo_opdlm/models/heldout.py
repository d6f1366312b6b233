"""The held-out divergence: one fixed set of half-masked states, comparable over time and not gamed by degenerate text."""

import hashlib
from dataclasses import dataclass

import torch

from nemo_opdlm.diffusion.sampler import RolloutSettings
from nemo_opdlm.diffusion.state_selection import DenoisingState, random_mask
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.distillation.divergence import DivergenceSpec
from nemo_opdlm.megatron.rollout import RolloutEngine
from nemo_opdlm.megatron.step import mean_divergence
from nemo_opdlm.megatron.student import HiddenStatesGPT
from nemo_opdlm.megatron.teacher import Teacher, TeacherTargets

#: Always the full forward KL, whatever the run trains on.
HELDOUT_DIVERGENCE = DivergenceSpec()


@dataclass(frozen=True)
class HeldoutSet:
    """The teacher's own answers to held-out prompts, randomly masked once, and the teacher's targets on them."""

    trajectory: Trajectory
    states: DenoisingState
    targets: TeacherTargets

    @staticmethod
    def build(
        teacher: Teacher,
        engine: RolloutEngine,
        prompt_ids: torch.Tensor,
        prompt_len: torch.Tensor,
        response_length: int,
        settings: RolloutSettings,
    ) -> "HeldoutSet":
        """Sample the teacher at temperature 1 and mask each block with its own t ~ U(0, 1).

        Args:
            teacher: gives the targets.
            engine: decodes with the teacher's network.
            prompt_ids, prompt_len: held-out prompts ``[B, P]``.
            response_length: tokens per answer.
            settings: block size, mask and end tokens; its seed and step make the set reproducible.
        """
        rows = torch.arange(prompt_len.shape[0], device=prompt_len.device)
        limit = torch.full_like(prompt_len, response_length)
        trajectory = engine.generate_autoregressive(prompt_ids, prompt_len, limit, rows, settings)
        states = random_mask(
            trajectory, settings.mask_token_id, num_states=1, seed=settings.seed, step=settings.step
        )
        return HeldoutSet(trajectory, states, teacher.targets(trajectory, HELDOUT_DIVERGENCE))

    @property
    def checksum(self) -> str:
        """SHA-256 of tokens and masks: equal where two figures may be compared."""
        digest = hashlib.sha256()
        for tensor in (self.trajectory.token_ids, self.trajectory.response_len, self.states.loss_mask):
            digest.update(tensor.cpu().numpy().astype("<i8").tobytes())
        return digest.hexdigest()

    def divergence(self, student: HiddenStatesGPT, micro_batch_size: int) -> float:
        """Forward KL(teacher || student) in nats, mean over the masked tokens of the set."""
        was_training = student.training
        student.eval()
        try:
            return mean_divergence(
                student, self.trajectory, self.states, self.targets, HELDOUT_DIVERGENCE, micro_batch_size
            )
        finally:
            student.train(was_training)
