"""The record of a rollout: what the student wrote, and when it revealed each token."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

#: Unmask step of a token that no denoising forward revealed.
NEVER_UNMASKED: int = 2**31 - 1

_FILL = {"token_ids": 0, "unmask_step": NEVER_UNMASKED, "confidence": 0.0}
_DTYPES = {"unmask_step": torch.int32, "confidence": torch.float32}


class FinishReason(IntEnum):
    """Why a response ends: it closed its turn, or it met its length limit."""

    END_OF_TURN = 0
    LENGTH = 1


@dataclass(frozen=True)
class Trajectory:
    """B rollouts on the canvas of absolute positions, L a multiple of the block size.

    A row is prompt, response and the rest of the response's final block, which keeps what the sampler saw. What lies
    beyond is padding. Raises ValueError for records that contradict themselves: a wrong unmask step would silently
    become a state that was never visited.

    Attributes:
        token_ids: int64 ``[B, L]``.
        prompt_len: int64 ``[B]``, P >= 1.
        response_len: int64 ``[B]``, R >= 1, an end-of-turn token included.
        unmask_step: int32 ``[B, L]``, number of the denoising forward (from 1, over the whole response) that revealed
            the token; 0 in the prompt, ``NEVER_UNMASKED`` in the padding and for tokens that no forward revealed.
        confidence: float32 ``[B, L]``, unfiltered probability of the token when it was revealed, else 0; NaN where the
            network's logits were not finite.
        finish_reason: int64 ``[B]``, of :class:`FinishReason`.
        num_forwards: int64 ``[B]``, denoising forwards spent.
        sample_ids: int64 ``[B]``, global sample numbers, the key of all randomness.
        block_size: tokens of a block.
    """

    token_ids: Tensor
    prompt_len: Tensor
    response_len: Tensor
    unmask_step: Tensor
    confidence: Tensor
    finish_reason: Tensor
    num_forwards: Tensor
    sample_ids: Tensor
    block_size: int

    def __post_init__(self) -> None:
        """Check shapes, types and values."""
        if self.block_size < 1:
            raise ValueError(f"Trajectory.block_size={self.block_size}; allowed: at least 1")
        if self.token_ids.dim() != 2 or self.token_ids.shape[1] % self.block_size:
            raise ValueError(
                f"Trajectory.token_ids has shape {tuple(self.token_ids.shape)}; "
                f"allowed: [B, L] with L a multiple of block_size={self.block_size}"
            )
        for name, tensor in self._tensors().items():
            shape = self.token_ids.shape if name in _FILL else self.token_ids.shape[:1]
            dtype = _DTYPES.get(name, torch.int64)
            if tensor.shape != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"Trajectory.{name} is {tensor.dtype} {tuple(tensor.shape)}; allowed: {dtype} {tuple(shape)}"
                )
        self._check_values()

    def _check_values(self) -> None:
        step, confidence, positions = self.unmask_step, self.confidence, self._positions
        in_prompt, beyond = positions < self.prompt_len[:, None], positions >= self.row_end[:, None]
        rules = {
            "prompt_len and response_len must be at least 1": (self.prompt_len < 1) | (self.response_len < 1),
            "prompt_len + response_len must fit the canvas": self.row_end > self.token_ids.shape[1],
            "unmask_step must be 0 in the prompt": (in_prompt & (step != 0)).any(1),
            "unmask_step must be at least 1 after the prompt": (~in_prompt & (step < 1)).any(1),
            "unmask_step must be NEVER_UNMASKED past the final block": (beyond & (step != NEVER_UNMASKED)).any(1),
            "confidence must be a probability": ((confidence < 0) | (confidence > 1)).any(1),
            "finish_reason must be a FinishReason": (self.finish_reason < 0) | (self.finish_reason > 1),
        }
        # One transfer for all rules: records are made inside the training loop.
        for rule, broken in zip(rules, torch.stack(list(rules.values())).any(1).tolist(), strict=True):
            if broken:
                raise ValueError(f"Trajectory: {rule}; broken in rows {rules[rule].nonzero()[:, 0].tolist()}")

    def __len__(self) -> int:
        """Number of rollouts B."""
        return self.token_ids.shape[0]

    @property
    def row_end(self) -> Tensor:
        """First position past each row's final block, int64 ``[B]``."""
        total = self.prompt_len + self.response_len
        return -(-total // self.block_size) * self.block_size

    @property
    def is_response(self) -> Tensor:
        """Real response positions P <= i < P + R, bool ``[B, L]``."""
        start = self.prompt_len[:, None]
        return (self._positions >= start) & (self._positions < start + self.response_len[:, None])

    @property
    def is_end_token(self) -> Tensor:
        """The end-of-turn token that closed each response, bool ``[B, L]``; nowhere in a response cut by its limit."""
        last = self._positions == (self.prompt_len + self.response_len - 1)[:, None]
        return last & (self.finish_reason == FinishReason.END_OF_TURN)[:, None]

    @property
    def _positions(self) -> Tensor:
        return torch.arange(self.token_ids.shape[1], device=self.token_ids.device)

    def index(self, rows: Tensor | slice) -> "Trajectory":
        """Some of the rollouts."""
        return self._map(lambda _, tensor: tensor[rows])

    def to(self, device: torch.device | str) -> "Trajectory":
        """The record on another device."""
        return self._map(lambda _, tensor: tensor.to(device))

    def state_at(self, step: Tensor | int, mask_token_id: int) -> Tensor:
        """The canvas as it was before denoising forward ``step`` (broadcast to ``[B, L]``), int64 ``[B, L]``.

        Tokens revealed by that forward or a later one are masked, up to the end of the final block.
        """
        is_masked = (self.unmask_step >= step) & (self._positions < self.row_end[:, None])
        return self.token_ids.masked_fill(is_masked, mask_token_id)

    def with_block_size(self, block_size: int) -> "Trajectory":
        """The same tokens on another grid; a final block that gets longer ends in tokens that were never unmasked."""
        total = self.prompt_len + self.response_len
        row_end = -(-total // block_size) * block_size
        width = int(row_end.max())
        beyond = torch.arange(width, device=row_end.device) >= row_end[:, None]
        resized = {
            name: _resize(tensor, width, _FILL[name]).masked_fill(beyond, _FILL[name])
            for name, tensor in self._tensors().items()
            if name in _FILL
        }
        return replace(self, **resized, block_size=block_size)

    @staticmethod
    def cat(parts: "list[Trajectory]") -> "Trajectory":
        """Join batches of one block size, padded to the widest."""
        block_sizes = {part.block_size for part in parts}
        if len(block_sizes) != 1:
            raise ValueError(f"Trajectory.cat: block sizes {sorted(block_sizes)}; allowed: batches of one block size")
        width = max(part.token_ids.shape[1] for part in parts)
        return parts[0]._map(
            lambda name, _: torch.cat(
                [
                    _resize(tensor, width, _FILL[name]) if name in _FILL else tensor
                    for tensor in (getattr(part, name) for part in parts)
                ]
            )
        )

    def state_dict(self) -> dict[str, Tensor | int]:
        """Plain tensors and integers, to be saved."""
        return {**self._tensors(), "block_size": self.block_size}

    @staticmethod
    def from_state_dict(state: dict[str, Any]) -> "Trajectory":
        """Undo :meth:`state_dict`."""
        return Trajectory(**state)

    def _tensors(self) -> dict[str, Tensor]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "block_size"}

    def _map(self, function: Callable[[str, Tensor], Tensor]) -> "Trajectory":
        mapped = {name: function(name, tensor) for name, tensor in self._tensors().items()}
        return Trajectory(**mapped, block_size=self.block_size)


def given_texts(
    prompts: Sequence[Tensor],
    responses: Sequence[Tensor],
    sample_ids: Tensor,
    mask_token_id: int,
    block_size: int,
    end_token_ids: Collection[int] = (),
) -> Trajectory:
    """Texts nobody decoded as the record that states are made of; the canvas is masked where it has no text.

    Args:
        prompts: what is given, int64 ``[P]`` each, P >= 1.
        responses: what follows, int64 ``[R]`` each, R >= 1.
        sample_ids: int64 ``[B]``, the key of the states drawn.
        mask_token_id: stands beyond the text.
        block_size: tokens of a block.
        end_token_ids: a response whose last token is one of them has closed its turn.
    """
    prompt_len = torch.tensor([len(prompt) for prompt in prompts])
    response_len = torch.tensor([len(response) for response in responses])
    width = -(-int((prompt_len + response_len).max()) // block_size) * block_size
    token_ids = torch.full((len(prompts), width), mask_token_id)
    for row, text in enumerate(zip(prompts, responses, strict=True)):
        joined = torch.cat(text)
        token_ids[row, : len(joined)] = joined
    in_prompt = torch.arange(width) < prompt_len[:, None]
    is_closed = torch.tensor([int(response[-1]) in end_token_ids for response in responses])
    return Trajectory(
        token_ids=token_ids,
        prompt_len=prompt_len,
        response_len=response_len,
        unmask_step=torch.where(in_prompt, 0, NEVER_UNMASKED).int(),
        confidence=torch.zeros(token_ids.shape),
        finish_reason=torch.where(is_closed, FinishReason.END_OF_TURN, FinishReason.LENGTH),
        num_forwards=torch.zeros_like(prompt_len),
        sample_ids=sample_ids,
        block_size=block_size,
    )


def _resize(tensor: Tensor, width: int, fill: float) -> Tensor:
    """Cut or pad ``[B, L]`` to ``[B, width]``."""
    return F.pad(tensor, (0, width - tensor.shape[1]), value=fill)
