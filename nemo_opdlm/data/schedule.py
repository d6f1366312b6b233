"""Which prompts a rollout step uses: a pure function of the step, so a resumed run needs no data state."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opdlm.rng import Stream, permutation


@dataclass(frozen=True)
class SampleBatch:
    """The samples of one rollout step, or one data-parallel rank's share of them.

    sample_ids        int64 [S]  unique over the whole run: the key of all randomness of a sample
    prompt_numbers    int64 [S]  position in the endless prompt stream, from 0; equal for copies of one prompt
    dataset_indices   int64 [S]  row of the PromptDataset
    """

    sample_ids: Tensor
    prompt_numbers: Tensor
    dataset_indices: Tensor

    def __len__(self) -> int:
        """Number of samples S."""
        return int(self.sample_ids.numel())

    def shard(self, dp_rank: int, dp_size: int) -> "SampleBatch":
        """The samples of one data-parallel rank: every `dp_size`-th, starting at `dp_rank`.

        Strided, not contiguous: update u then trains the samples [u * g, (u + 1) * g) of the step on every layout, each
        rank holding g / dp_size consecutive ones of its own. Raises ValueError unless the ranks share evenly.
        """
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"dp_rank must be in [0, dp_size), got dp_rank={dp_rank}, dp_size={dp_size}")
        if len(self) % dp_size:
            raise ValueError(f"{len(self)} samples per rollout step do not divide over {dp_size} data-parallel ranks")
        mine = slice(dp_rank, None, dp_size)
        return SampleBatch(self.sample_ids[mine], self.prompt_numbers[mine], self.dataset_indices[mine])


@dataclass(frozen=True)
class PromptSchedule:
    """Endless stream of prompts, cut into rollout steps.

    The data set is shuffled once per epoch and read in sequential chunks of `num_prompts`; a chunk that reaches the end
    of an epoch is topped up from the next, reshuffled one, which then goes on from there. Every prompt is answered
    `num_responses_per_prompt` times, copies side by side.
    """

    dataset_size: int
    num_prompts: int
    num_responses_per_prompt: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse empty data sets and empty steps."""
        for name in ("dataset_size", "num_prompts", "num_responses_per_prompt"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def steps_per_epoch(self) -> int:
        """Rollout steps until every prompt was used once; the last one may be topped up."""
        return -(-self.dataset_size // self.num_prompts)

    def indices(self, step: int) -> SampleBatch:
        """All samples of rollout step `step`, counted from 1. S = num_prompts * num_responses_per_prompt."""
        if step < 1:
            raise ValueError(f"rollout steps count from 1, got {step}")
        first = (step - 1) * self.num_prompts
        end = first + self.num_prompts
        epochs = range(first // self.dataset_size, (end - 1) // self.dataset_size + 1)
        stream = torch.cat([permutation(self.seed, Stream.SHUFFLE, epoch, self.dataset_size) for epoch in epochs])
        indices = stream[first - epochs.start * self.dataset_size :][: self.num_prompts]
        numbers = torch.arange(first, end)
        copies = self.num_responses_per_prompt
        sample_ids = torch.arange(first * copies, end * copies)
        return SampleBatch(sample_ids, numbers.repeat_interleave(copies), indices.repeat_interleave(copies))
