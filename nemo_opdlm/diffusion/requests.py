"""What a rollout is asked: prompts, and how long each of their answers may be."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Requests:
    """B prompts to answer, on one device; raises ValueError for none, for a length outside its prompt, for a limit below 1.

    Attributes:
        prompt_ids: int64 ``[B, P]``, padded on the right.
        prompt_len: int64 ``[B]``, from 1 to P.
        max_new_tokens: int64 ``[B]``, at least 1; a response of that length has no end token added.
        sample_ids: int64 ``[B]``, global sample numbers, the key of all randomness.
    """

    prompt_ids: Tensor
    prompt_len: Tensor
    max_new_tokens: Tensor
    sample_ids: Tensor

    def __post_init__(self) -> None:
        """Check the lengths: one read of the device, before any forward."""
        width = self.prompt_ids.shape[1]
        fits = (self.prompt_len >= 1) & (self.prompt_len <= width) & (self.max_new_tokens >= 1)
        if len(self) == 0 or not bool(fits.all()):
            raise ValueError(
                f"prompt_len={self.prompt_len.tolist()} and max_new_tokens={self.max_new_tokens.tolist()}; allowed: "
                f"at least one row, prompts of 1 to {width} tokens, and at least 1 new token"
            )

    def __len__(self) -> int:
        """Number of prompts B."""
        return self.prompt_len.numel()

    def index(self, rows: Tensor) -> "Requests":
        """Some of the prompts."""
        return self._map(lambda tensor: tensor[rows])

    def to(self, device: torch.device | str) -> "Requests":
        """The requests on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> "Requests":
        return Requests(
            function(self.prompt_ids),
            function(self.prompt_len),
            function(self.max_new_tokens),
            function(self.sample_ids),
        )
