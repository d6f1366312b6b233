"""How a batch is rolled out, and how far that is."""

from dataclasses import dataclass
from typing import TypedDict

from nemo_opdlm.diffusion.remasking import RemaskingParams


class RolloutProgress(TypedDict):
    """State of a rollout in plain integers: batched forwards so far, open rows, rows, response tokens in finished blocks.

    ``num_row_forwards`` counts each forward once for every row that took part.
    """

    num_forwards: int
    num_row_forwards: int
    num_active: int
    num_rows: int
    num_tokens: int


def describe(progress: RolloutProgress) -> str:
    """How far a rollout is: ``3/8 responses, 2.31 tokens per forward``."""
    num_finished = progress["num_rows"] - progress["num_active"]
    tokens_per_forward = progress["num_tokens"] / max(progress["num_row_forwards"], 1)
    return f"{num_finished}/{progress['num_rows']} responses, {tokens_per_forward:.2f} tokens per forward"


@dataclass(frozen=True)
class RolloutSettings:
    """How a batch is rolled out; raises ValueError outside the ranges.

    Attributes:
        block_size: b.
        denoising_steps: S, most denoising steps of a block; at least 1.
        remasking: which positions a step reveals.
        mask_token_id: stands at positions that are not revealed yet.
        end_token_ids: tokens that end a response.
        seed: the run's seed.
        step: rollout step, part of the key of all randomness.
    """

    block_size: int
    denoising_steps: int
    remasking: RemaskingParams
    mask_token_id: int
    end_token_ids: tuple[int, ...]
    seed: int
    step: int

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("block_size", "denoising_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}; allowed: at least 1")
        if self.mask_token_id in self.end_token_ids:
            raise ValueError(f"mask_token_id={self.mask_token_id} is also an end token; allowed: any other token")
