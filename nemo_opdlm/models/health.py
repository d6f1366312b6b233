"""What ends a run that would go on in vain: updates that are all skipped, responses that are mostly garbage."""

from collections.abc import Sequence

import torch

from nemo_opdlm.config.method import RolloutConfig
from nemo_opdlm.diffusion.garbage import is_empty, is_repeated
from nemo_opdlm.diffusion.trajectory import FinishReason, Trajectory

_MOST_NAMED = 16


class UnhealthyRun(ValueError):
    """The run stops; one line says why, on which prompts, and what may help."""


def rollout_health(trajectory: Trajectory) -> dict[str, float]:
    """Shares of responses that were cut at their length limit, are empty, or repeat one token throughout."""
    flags = {
        "truncated": trajectory.finish_reason == FinishReason.LENGTH,
        "empty": is_empty(trajectory),
        "repeated": is_repeated(trajectory),
    }
    return {f"rollout/{name}_frac": float(flag.float().mean()) for name, flag in flags.items()}


def check_rollout(trajectory: Trajectory, rollout_step: int, row_ids: Sequence[str], settings: RolloutConfig) -> None:
    """Stop where too many responses are garbage. One that the curriculum has cut short is none.

    Args:
        trajectory: all responses of a rollout step.
        rollout_step: its number, from 1.
        row_ids: names of their prompts.
        settings: threshold and warm-up.

    Raises:
        UnhealthyRun: more than ``max_garbage_frac`` of them are, after ``garbage_warmup_steps`` rollout steps.
    """
    limit, warmup = settings.max_garbage_frac, settings.garbage_warmup_steps
    empty, repeated = is_empty(trajectory), is_repeated(trajectory)
    garbage = empty | repeated
    if limit is None or rollout_step <= warmup or float(garbage.float().mean()) <= limit:
        return
    rows = [row_ids[number] for number in torch.nonzero(garbage)[:, 0].tolist()]
    raise UnhealthyRun(
        f"{int(empty.sum())} empty responses and {int(repeated.sum())} of one repeated token among {len(trajectory)} of rollout "
        f"step {rollout_step} are more than model.opdlm.rollout.max_garbage_frac={limit} (rows {_named(rows)} of the "
        "prompts): the student has collapsed; start from an earlier checkpoint with a lower model.optim.lr, or check the chat "
        "template and model.opdlm.rollout.end_token_ids"
    )


def too_many_skips(
    num_in_a_row: int, grad_norm: float, loss: float, row_ids: Sequence[str], rollout_step: int
) -> UnhealthyRun:
    """What to raise where the last so many updates were skipped, the last one for these prompts."""
    return UnhealthyRun(
        f"{num_in_a_row} updates in a row were skipped (model.opdlm.max_consecutive_skips), the last one with "
        f"train/grad_norm={grad_norm} and train/loss={loss} on rows {_named(row_ids)} of the prompts in rollout step "
        f"{rollout_step}: look at these rows, lower model.optim.lr, or set trainer.precision=32"
    )


def _named(row_ids: Sequence[str]) -> str:
    """Names of prompts, each once and not too many."""
    names = list(dict.fromkeys(row_ids))
    more = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
