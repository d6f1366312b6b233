"""Which responses are garbage: empty ones, and one token throughout; not those that are short or cut."""

import pytest
import torch

from nemo_opdlm.diffusion.garbage import is_empty, is_repeated
from nemo_opdlm.diffusion.trajectory import NEVER_UNMASKED, FinishReason, Trajectory

END, BLOCK = 9, 4


def trajectory(prompt: list[int], response: list[int], width: int = 20) -> Trajectory:
    """One rollout; a response that does not end in END was cut at its limit."""
    total, unmask_step = len(prompt) + len(response), torch.full((1, width), NEVER_UNMASKED, dtype=torch.int32)
    unmask_step[0, : len(prompt)] = 0
    unmask_step[0, len(prompt) : total] = torch.arange(1, len(response) + 1)
    reason = FinishReason.END_OF_TURN if response[-1] == END else FinishReason.LENGTH
    return Trajectory(
        token_ids=torch.tensor([prompt + response + [0] * (width - total)]),
        prompt_len=torch.tensor([len(prompt)]),
        response_len=torch.tensor([len(response)]),
        unmask_step=unmask_step,
        confidence=torch.zeros(1, width),
        finish_reason=torch.tensor([int(reason)]),
        num_forwards=torch.tensor([len(response)]),
        sample_ids=torch.tensor([0]),
        block_size=BLOCK,
    )


@pytest.mark.parametrize(
    ("response", "empty", "repeated"),
    [
        ([END], True, False),
        ([5, END], False, False),
        ([5] * 7 + [END], False, False),
        ([5] * 8 + [END], False, True),
        ([5] * 8, False, True),
        ([5] * 7 + [6] + [END], False, False),
        ([5, 6, 7, 8], False, False),
    ],
)
def test_garbage_is_what_says_nothing(response: list[int], empty: bool, repeated: bool) -> None:
    rollout = trajectory([5, 5, 3], response)
    assert bool(is_empty(rollout)) is empty
    assert bool(is_repeated(rollout)) is repeated


def test_a_response_is_judged_without_prompt_and_padding() -> None:
    assert bool(is_repeated(trajectory([1, 2, 3], [7] * 10)))
    assert bool(is_repeated(trajectory([1, 2], [7] * 18)))
