"""Right padding with explicit lengths."""

import pytest
import torch

from nemo_opdlm.data.collate import collate


def test_prompts_are_right_padded_and_lengths_are_explicit():
    prompts = [torch.tensor(ids) for ids in ([5, 0, 7], [1], [2, 0])]
    prompt_ids, prompt_len = collate(prompts, pad_id=0)
    assert prompt_ids.tolist() == [[5, 0, 7], [1, 0, 0], [2, 0, 0]]
    assert prompt_len.tolist() == [3, 1, 2]
    assert prompt_ids.dtype == prompt_len.dtype == torch.int64
    assert all(torch.equal(row[:n], p) for row, n, p in zip(prompt_ids, prompt_len, prompts, strict=True))


def test_nothing_to_collate_is_refused():
    for prompts in ([], [torch.tensor([1]), torch.tensor([], dtype=torch.int64)]):
        with pytest.raises(ValueError, match="cannot collate"):
            collate(prompts, pad_id=0)
