"""One set of figures for a student, the same before and after training."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.evaluation.decoding import divergences, judge, repeated_ngrams
from nemo_opdlm.models.opdlm_model import OPDLMModel
from nemo_opdlm.models.settings import HELDOUT_SAMPLING, HELDOUT_SEED

#: Greedy dynamic decoding, the setting the student is served with.
SERVED_REMASKING = RemaskingParams(RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC, threshold=0.9)
GREEDY = SamplingParams(temperature=0.0)
#: Rollouts over the held-out prompts that one call of ``compare`` makes, for a progress bar.
NUM_ROLLOUTS = 2

OnProgress = Callable[..., None]


@dataclass(frozen=True)
class Comparison:
    """Figures of a student and the greedy responses they were read from.

    Attributes:
        figures: ``heldout_kl`` (the number to trust), ``kl`` on the student's own states, and ``DecodingReport``.
        responses: greedy dynamic decoding of the held-out prompts.
    """

    figures: dict[str, float]
    responses: Trajectory


@torch.no_grad()
def compare(model: OPDLMModel, on_progress: OnProgress | None = None) -> Comparison:
    """Evaluate a model against its teacher on its held-out prompts.

    Args:
        model: with prompts and teacher (``models.training.restore``), before or after its training.
        on_progress: of the rollouts (``diffusion.sampler.rollout``).
    """
    teacher, batch_size = model.teacher, model.config.data.validation_ds.num_samples
    assert teacher is not None
    sampled = respond(model, HELDOUT_SAMPLING, on_progress)
    greedy = respond(model, GREEDY, on_progress)
    on_states = divergences(teacher, model.model, model.heldout, sampled, model.method.mask_token_id, batch_size)
    return Comparison({**on_states, **judge(teacher, greedy).as_dict()}, greedy)


def respond(
    model: OPDLMModel,
    sampling: SamplingParams,
    on_progress: OnProgress | None = None,
    remasking: RemaskingParams = SERVED_REMASKING,
) -> Trajectory:
    """Block-diffusion responses to the held-out prompts."""
    settings = replace(model.method.rollout_settings(1), remasking=remasking, seed=HELDOUT_SEED, step=0)
    engine = model.method.engine(model.model, model.config.data.validation_ds.num_samples, sampling)
    return engine.generate(model.heldout_requests, settings, on_progress)


def respond_as_original(model: OPDLMModel, on_progress: OnProgress | None = None) -> Trajectory:
    """The AR original's greedy responses to the held-out prompts."""
    assert model.teacher is not None
    engine = model.method.engine(model.teacher.network, model.config.data.validation_ds.num_samples, GREEDY)
    settings = replace(model.method.rollout_settings(1), seed=HELDOUT_SEED, step=0)
    return engine.generate_autoregressive(model.heldout_requests, settings, on_progress)


def teacher_repeat_4gram(model: OPDLMModel, on_progress: OnProgress | None = None) -> float:
    """The teacher's own share of repeated 4-grams under greedy decoding, beside which the student's is read."""
    return repeated_ngrams(respond_as_original(model, on_progress), 4)
