"""Held-out responses as they were unmasked, beside what the teacher holds of each token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opdlm.data.recordings import CalibrationBin, RecordedResponse, Recording
from nemo_opdlm.data.tokenizer import text_of
from nemo_opdlm.diffusion.trajectory import FinishReason, Trajectory
from nemo_opdlm.distillation.divergence import DivergenceSpec, top_k_target
from nemo_opdlm.evaluation.decoding import own_token_losses
from nemo_opdlm.evaluation.generation import Generator
from nemo_opdlm.evaluation.scorer import Scorer
from nemo_opdlm.megatron.teacher import Teacher

#: Responses of which every token is recorded, the first ones; all of them count for the calibration.
NUM_RESPONSES = 8
_NUM_BINS = 10
_FIRST_CHOICE = DivergenceSpec(top_k=1)


@dataclass(frozen=True)
class Verdicts:
    """What a causal teacher holds of real response tokens, in row-major order, ``[sum R]`` each.

    Attributes:
        first_choices: its most likely tokens, int64.
        log_probs: its log-probabilities of the tokens that are there.
    """

    first_choices: Tensor
    log_probs: Tensor

    @staticmethod
    @torch.no_grad()
    def of(teacher: Teacher, trajectory: Trajectory) -> "Verdicts":
        """One causal pass over prompts and responses."""
        hidden, head = teacher.response_hidden(trajectory), teacher.head
        chunks = hidden.split(head.chunk_rows(_FIRST_CHOICE))
        first = [top_k_target(head.logits(rows), _FIRST_CHOICE.top_k, head.vocab).token_ids[:, 0] for rows in chunks]
        return Verdicts(torch.cat(first), -own_token_losses(teacher, trajectory, hidden).divergence)


def record(teacher: Teacher, scorer: Scorer, trajectory: Trajectory) -> Recording:
    """What a student wrote in a mode, judged by its teacher."""
    verdicts = Verdicts.of(teacher, trajectory)
    places = trajectory.is_response
    return Recording(
        scorer.config.mode,
        trajectory.block_size,
        calibration(
            trajectory.confidence[places],
            trajectory.token_ids[places] == verdicts.first_choices,
            verdicts.log_probs.exp(),
        ),
        _responses(scorer.generator, trajectory, verdicts),
    )


def calibration(confidence: Tensor, agrees: Tensor, teacher_probability: Tensor) -> list[CalibrationBin]:
    """How often the teacher agrees, by the confidence with which tokens were revealed.

    Args:
        confidence: ``[T]``; tokens where it is not finite are left out.
        agrees: bool ``[T]``, whether the token is the teacher's most likely one.
        teacher_probability: ``[T]``, the teacher's of the token.
    """
    columns = torch.stack([confidence, agrees.float(), teacher_probability]).double()
    columns = columns[:, columns.isfinite().all(0)]
    numbers = (columns[0] * _NUM_BINS).long().clamp(max=_NUM_BINS - 1)
    bins = []
    for number in numbers.unique().tolist():
        inside = columns[:, numbers == number]
        low, high = number / _NUM_BINS, (number + 1) / _NUM_BINS
        bins.append(CalibrationBin(low, high, inside.shape[1], *inside.mean(1).clamp(0, 1).tolist()))
    return bins


def _responses(generator: Generator, trajectory: Trajectory, verdicts: Verdicts) -> list[RecordedResponse]:
    lengths = trajectory.response_len.tolist()
    rows = zip(verdicts.first_choices.split(lengths), verdicts.log_probs.split(lengths), strict=True)
    return [
        _response(generator, trajectory.index(slice(number, number + 1)), first_choices, log_probs)
        for number, (first_choices, log_probs) in enumerate(list(rows)[:NUM_RESPONSES])
    ]


def _response(generator: Generator, row: Trajectory, first_choices: Tensor, log_probs: Tensor) -> RecordedResponse:
    places = row.is_response[0]
    token_ids = row.token_ids[0]
    blocks = places.nonzero()[:, 0] // row.block_size
    return RecordedResponse(
        prompt=text_of(generator.tokenizer, token_ids[: int(row.prompt_len)]),
        pieces=generator.pieces(token_ids[places]),
        blocks=(blocks - blocks[0] + 1).tolist(),
        steps=row.unmask_step[0, places].tolist(),
        confidences=_finite(row.confidence[0, places]),
        first_choices=generator.pieces(first_choices),
        agrees=(token_ids[places] == first_choices).tolist(),
        log_probs=_finite(log_probs),
        num_forwards=int(row.num_forwards),
        finish_reason=FinishReason(int(row.finish_reason)).name.lower(),
    )


def _finite(values: Tensor) -> list[float | None]:
    return [round(value, 5) if known else None for value, known in zip(values.tolist(), values.isfinite(), strict=True)]
