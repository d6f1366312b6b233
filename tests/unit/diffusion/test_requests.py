"""What a rollout is asked: rows that stay together, and nothing that cannot be rolled out."""

import pytest
import torch

from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.testing.trajectories import random_requests


@pytest.mark.parametrize(("prompt_len", "limit"), [([3, 0], [1, 1]), ([3, 6], [1, 1]), ([3, 3], [1, 0]), ([], [])])
def test_lengths_that_cannot_be_rolled_out_are_refused(prompt_len: list[int], limit: list[int]) -> None:
    rows = torch.arange(len(prompt_len))
    prompts = torch.ones(len(rows), 5).long()
    with pytest.raises(ValueError, match="prompt_len=.*prompts of 1 to 5 tokens"):
        Requests(prompts, torch.tensor(prompt_len).long(), torch.tensor(limit).long(), rows)


def test_rows_are_chosen_and_moved_with_all_that_belongs_to_them() -> None:
    requests, rows = random_requests(6, 4), torch.tensor([4, 4, 1])
    some = requests.index(rows).to("cpu")
    assert len(requests) == 6 and len(some) == 3
    for name in ("prompt_ids", "prompt_len", "max_new_tokens", "sample_ids"):
        assert torch.equal(getattr(some, name), getattr(requests, name)[rows]), name
