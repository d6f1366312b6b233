"""Which half-masked states of a trajectory are trained."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Never

import torch
from torch import Tensor

from nemo_opdlm.diffusion.noising import random_block_mask
from nemo_opdlm.diffusion.trajectory import NEVER_UNMASKED, Trajectory
from nemo_opdlm.rng import Stream, uniform


@dataclass(frozen=True)
class DenoisingState:
    """Half-masked copies of B responses on the canvas, and which of their masks are supervised.

    Attributes:
        state_ids: int64 ``[B, C, L]``, the canvas with masks.
        loss_mask: bool ``[B, C, L]``, real response positions that are masked in the copy.
        num_states: int64 ``[B]``, copies in use of each row, the first of the C.
    """

    state_ids: Tensor
    loss_mask: Tensor
    num_states: Tensor

    def __post_init__(self) -> None:
        """Check that the shapes agree."""
        shape = self.state_ids.shape
        if len(shape) != 3 or self.loss_mask.shape != shape or self.num_states.shape != shape[:1]:
            raise ValueError(
                f"DenoisingState: state_ids {tuple(shape)}, loss_mask {tuple(self.loss_mask.shape)}, "
                f"num_states {tuple(self.num_states.shape)}; allowed: [B, C, L] twice and [B]"
            )

    def __len__(self) -> int:
        """Number of rollouts B."""
        return self.state_ids.shape[0]

    def index(self, rows: Tensor | slice) -> "DenoisingState":
        """The states of some of the rollouts."""
        return DenoisingState(self.state_ids[rows], self.loss_mask[rows], self.num_states[rows])

    def to(self, device: torch.device | str) -> "DenoisingState":
        """The states on another device."""
        return DenoisingState(self.state_ids.to(device), self.loss_mask.to(device), self.num_states.to(device))


def one_state_per_block(
    trajectory: Trajectory,
    mask_token_id: int,
    *,
    num_states: int = 1,
    seed: int,
    step: int,
    epoch: int = 0,
    exclude_end_token: bool = False,
) -> DenoisingState:
    """For every copy and block, one of the block's states, uniformly and independently, stitched into one canvas.

    The state of an unmasking event is the one just before it, so a block has as many states as events that revealed one
    of its real response tokens; the clean terminal state is none of them. Raises ValueError where such a token has no
    unmask step.
    """
    steps, is_event = _events(trajectory)
    first_position = torch.arange(0, trajectory.token_ids.shape[1], trajectory.block_size, device=steps.device)
    copies = torch.arange(num_states, device=steps.device) + epoch * num_states
    draw = uniform(seed, Stream.STATE, step, trajectory.sample_ids[:, None, None], first_position, copies[:, None])
    num_events = is_event.sum(-1)[:, None]
    state_number = (draw * num_events).long().clamp(max=num_events - 1)
    counts = torch.full_like(trajectory.prompt_len, num_states)
    return _states(trajectory, mask_token_id, _event_step(steps, is_event, state_number), counts, exclude_end_token)


def all_states(
    trajectory: Trajectory,
    mask_token_id: int,
    *,
    num_states: int = 1,
    seed: int = 0,
    step: int = 0,
    epoch: int = 0,
    exclude_end_token: bool = False,
) -> DenoisingState:
    """Every state of every block: copy s holds each block's s-th one, most masked first.

    Blocks with fewer states stay clean in the later copies and are not supervised there. Nothing is drawn:
    ``num_states``, ``seed``, ``step`` and ``epoch`` have no effect.
    """
    steps, is_event = _events(trajectory)
    num_events = is_event.sum(-1)
    counts = num_events.amax(-1)
    state_number = torch.arange(int(counts.max()), device=steps.device)[None, :, None]
    event_step = _event_step(steps, is_event, state_number)
    return _states(trajectory, mask_token_id, event_step, counts, exclude_end_token)


def random_mask(
    trajectory: Trajectory,
    mask_token_id: int,
    *,
    num_states: int = 1,
    seed: int,
    step: int,
    epoch: int = 0,
    exclude_end_token: bool = False,
) -> DenoisingState:
    """Random states: each block's real response tokens are masked with a probability t ~ U(0, 1), at least one of them.

    The rest of the final block is kept, or masked where no forward ever revealed it (responses that were not sampled
    by the student).
    """
    block_size = trajectory.block_size
    positions = torch.arange(trajectory.token_ids.shape[1], device=trajectory.token_ids.device)
    copies = torch.arange(num_states, device=positions.device)[:, None] + epoch * num_states
    samples = trajectory.sample_ids[:, None, None]
    ratio = uniform(seed, Stream.NOISE, step, samples, positions[::block_size], 2 * copies)
    token_draw = uniform(seed, Stream.NOISE, step, samples, positions, 2 * copies + 1)
    eligible = _blocks(trajectory.is_response, block_size)[:, None].expand(-1, num_states, -1, -1)
    is_masked = random_block_mask(eligible, ratio, _blocks(token_draw, block_size)).flatten(-2)
    was_never_seen = ~trajectory.is_response & (trajectory.unmask_step == NEVER_UNMASKED)
    counts = torch.full_like(trajectory.prompt_len, num_states)
    return _masked_canvas(trajectory, mask_token_id, is_masked | was_never_seen[:, None], counts, exclude_end_token)


class StateSelection(StrEnum):
    """The ways to select states."""

    ONE_STATE_PER_BLOCK = "one_state_per_block"
    ALL_STATES = "all_states"
    RANDOM_MASK = "random_mask"

    @classmethod
    def _missing_(cls, value: object) -> Never:
        raise ValueError(f"state selection {value!r}; allowed: {[selection.value for selection in cls]}")


_SELECTIONS: dict[StateSelection, Callable[..., DenoisingState]] = {
    StateSelection.ONE_STATE_PER_BLOCK: one_state_per_block,
    StateSelection.ALL_STATES: all_states,
    StateSelection.RANDOM_MASK: random_mask,
}


def select_states(
    name: StateSelection | str,
    trajectory: Trajectory,
    mask_token_id: int,
    *,
    num_states: int = 1,
    seed: int,
    step: int,
    epoch: int = 0,
    exclude_end_token: bool = False,
) -> DenoisingState:
    """Select states by the name of the way to do it.

    Args:
        name: a :class:`StateSelection` or its value; anything else raises ValueError.
        trajectory: finished responses.
        mask_token_id: stands at masked positions.
        num_states: copies of each row; ``all_states`` makes as many as there are.
        seed: the run's seed.
        step: rollout step.
        epoch: number of the pass over this rollout batch; each has states of its own.
        exclude_end_token: do not supervise the end-of-turn token, as the official code does.
    """
    return _SELECTIONS[StateSelection(name)](
        trajectory,
        mask_token_id,
        num_states=num_states,
        seed=seed,
        step=step,
        epoch=epoch,
        exclude_end_token=exclude_end_token,
    )


def revealed_from(trajectory: Trajectory, states: DenoisingState) -> Tensor:
    """Supervised tokens that were revealed by the very forward that saw their block's state, bool ``[B, C, L]``.

    ``states`` are visited ones, of ``one_state_per_block`` or ``all_states``.
    """
    # Also masks without supervision tell which forward it was; no response holds a mask token.
    is_masked = states.state_ids != trajectory.token_ids[:, None]
    steps = trajectory.unmask_step[:, None].expand_as(is_masked)
    event_step = _blocks(steps.masked_fill(~is_masked, NEVER_UNMASKED), trajectory.block_size).amin(-1)
    return states.loss_mask & (steps == event_step.repeat_interleave(trajectory.block_size, dim=-1))


def _blocks(canvas: Tensor, block_size: int) -> Tensor:
    return canvas.reshape(*canvas.shape[:-1], -1, block_size)


def _events(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """Sorted unmask steps of each block ``[B, L/b, b]``, and which of them open a new unmasking event."""
    is_response = trajectory.is_response
    if bool((is_response & (trajectory.unmask_step == NEVER_UNMASKED)).any()):
        raise ValueError("the trajectory has response tokens without unmask step: it has no denoising states")
    steps = trajectory.unmask_step.masked_fill(~is_response, NEVER_UNMASKED)
    steps = _blocks(steps, trajectory.block_size).sort(-1).values
    is_event = steps != NEVER_UNMASKED
    is_event[..., 1:] &= steps[..., 1:] != steps[..., :-1]
    return steps, is_event


def _event_step(steps: Tensor, is_event: Tensor, state_number: Tensor) -> Tensor:
    """Unmask step of event ``state_number [B, C, L/b]`` of each block; NEVER_UNMASKED where it has no such event."""
    event_number = (is_event.cumsum(-1) - 1)[:, None]
    is_drawn = is_event[:, None] & (event_number == state_number[..., None])
    return steps[:, None].masked_fill(~is_drawn, NEVER_UNMASKED).amin(-1)


def _states(
    trajectory: Trajectory, mask_token_id: int, event_step: Tensor, num_states: Tensor, exclude_end_token: bool
) -> DenoisingState:
    """The states just before the events ``[B, C, L/b]``."""
    since = event_step.repeat_interleave(trajectory.block_size, dim=-1)
    is_masked = trajectory.unmask_step[:, None] >= since
    return _masked_canvas(trajectory, mask_token_id, is_masked, num_states, exclude_end_token)


def _masked_canvas(
    trajectory: Trajectory, mask_token_id: int, is_masked: Tensor, num_states: Tensor, exclude_end_token: bool
) -> DenoisingState:
    """Mask ``[B, C, L]`` positions, up to the end of the final block, and supervise the real ones among them."""
    positions = torch.arange(is_masked.shape[-1], device=is_masked.device)
    is_masked = is_masked & (positions < trajectory.row_end[:, None])[:, None]
    supervised = trajectory.is_response
    if exclude_end_token:
        supervised = supervised & ~trajectory.is_end_token
    state_ids = trajectory.token_ids[:, None].expand_as(is_masked).masked_fill(is_masked, mask_token_id)
    return DenoisingState(state_ids, is_masked & supervised[:, None], num_states)
