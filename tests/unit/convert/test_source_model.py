"""Interleaved and half-split rotary positions give the same attention scores after reordering."""

import torch

from nemo_opdlm.convert.source_model import half_split_rope


def rotate(vectors: torch.Tensor, pairs: list[tuple[int, int]]) -> torch.Tensor:
    """Turn each pair of channels of [positions, dim] by position * its own frequency."""
    turned = vectors.clone()
    for number, (first, second) in enumerate(pairs):
        angle = torch.arange(vectors.shape[0]) * 0.3 ** (number + 1)
        turned[:, first] = vectors[:, first] * angle.cos() - vectors[:, second] * angle.sin()
        turned[:, second] = vectors[:, first] * angle.sin() + vectors[:, second] * angle.cos()
    return turned


def test_reordered_projections_give_the_same_scores_under_half_split_rope() -> None:
    torch.manual_seed(0)
    heads, dim, width, length = 3, 8, 5, 6
    query, key = torch.randn(heads * dim, width), torch.randn(heads * dim, width)
    inputs = torch.randn(length, width)
    interleaved = [(2 * i, 2 * i + 1) for i in range(dim // 2)]
    half_split = [(i, i + dim // 2) for i in range(dim // 2)]

    def scores(query: torch.Tensor, key: torch.Tensor, pairs: list[tuple[int, int]], head: int) -> torch.Tensor:
        q, k = ((inputs @ weight.T).view(length, heads, dim)[:, head] for weight in (query, key))
        return rotate(q, pairs) @ rotate(k, pairs).T

    for head in range(heads):
        expected = scores(query, key, interleaved, head)
        found = scores(half_split_rope(query, heads), half_split_rope(key, heads), half_split, head)
        torch.testing.assert_close(found, expected)
