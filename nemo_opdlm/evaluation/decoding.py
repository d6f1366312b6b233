"""What a student's decoded text is worth in its teacher's eyes."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from nemo_opdlm.diffusion.state_selection import select_states
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.distillation.divergence import DivergenceKind, DivergenceSpec, TokenTarget
from nemo_opdlm.megatron.head import TokenLosses, token_losses
from nemo_opdlm.megatron.student import StagedGPT
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.models.heldout import HeldoutSet
from nemo_opdlm.models.settings import HELDOUT_SEED


@dataclass(frozen=True)
class DecodingReport:
    """Figures of one set of decoded responses.

    Attributes:
        teacher_loglik: mean log-probability that the teacher gives a generated token, in nats.
        teacher_agreement: share of generated tokens that are the teacher's most likely ones.
        repeat_4gram: share of 4-grams that occurred before in the same response.
        tokens_per_forward: response tokens per denoising forward.
        response_len: mean response length in tokens.
    """

    teacher_loglik: float
    teacher_agreement: float
    repeat_4gram: float
    tokens_per_forward: float
    response_len: float

    def as_dict(self) -> dict[str, float]:
        """Plain numbers by name."""
        return asdict(self)


@torch.no_grad()
def judge(teacher: Teacher, trajectory: Trajectory) -> DecodingReport:
    """Score decoded responses under the causal teacher.

    A student that repeats itself scores well on likelihood and agreement: read them beside ``repeat_4gram`` and the
    held-out divergence, never alone.
    """
    losses = own_token_losses(teacher, trajectory, teacher.response_hidden(trajectory))
    num_tokens = int(trajectory.response_len.sum())
    return DecodingReport(
        teacher_loglik=float(-losses.divergence.mean()),
        teacher_agreement=float(losses.agrees.float().mean()),
        repeat_4gram=repeated_ngrams(trajectory, 4),
        tokens_per_forward=num_tokens / int(trajectory.num_forwards.sum()),
        response_len=num_tokens / len(trajectory),
    )


def own_token_losses(teacher: Teacher, trajectory: Trajectory, hidden: Tensor) -> TokenLosses:
    """Negative log-likelihoods of a response's own tokens, from the teacher's ``response_hidden`` of it."""
    own_tokens = TokenTarget(trajectory.token_ids[trajectory.is_response])
    spec = DivergenceSpec(DivergenceKind.nll)
    weights = torch.ones(hidden.shape[0], device=hidden.device)
    return token_losses(teacher.head, hidden, lambda start, stop: own_tokens.index(slice(start, stop)), spec, weights)


def divergences(
    teacher: Teacher, student: StagedGPT, heldout: HeldoutSet, sampled: Trajectory, mask_token_id: int, batch_size: int
) -> dict[str, float]:
    """``heldout_kl`` and ``kl``: on the fixed states, and on those that the student's sampled responses visited."""
    states = select_states("one_state_per_block", sampled, mask_token_id, num_states=1, seed=HELDOUT_SEED, step=0)
    return {
        "heldout_kl": heldout.divergence(student, batch_size),
        "kl": HeldoutSet.of(teacher, sampled, states).divergence(student, batch_size),
    }


def repeated_ngrams(trajectory: Trajectory, length: int) -> float:
    """Share of n-grams that occurred before in the same response; 0 where no response is long enough."""
    repeated = total = 0
    for response in responses(trajectory):
        windows = response.unfold(0, length, 1) if response.numel() >= length else response.new_empty(0, length)
        total += windows.shape[0]
        repeated += windows.shape[0] - windows.unique(dim=0).shape[0]
    return repeated / total if total else 0.0


def responses(trajectory: Trajectory) -> list[Tensor]:
    """Token ids of each response, an end-of-turn token included."""
    lengths: list[int] = trajectory.response_len.tolist()
    return list(trajectory.token_ids[trajectory.is_response].split(lengths))
