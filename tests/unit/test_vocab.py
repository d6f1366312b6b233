"""Reductions over a whole vocabulary, and what is made of them on any number of shards."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_opdlm.testing.threaded_vocab import on_shards
from nemo_opdlm.vocab import LocalVocab, VocabReducer, argmax, local_columns, lowest_id, top_k


def test_reductions_of_a_whole_vocabulary() -> None:
    vocab: VocabReducer = LocalVocab()
    x = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0), requires_grad=True)
    ids = torch.tensor([[[4, 0], [1, 1]]]).expand(3, -1, -1)
    assert vocab.start == 0
    assert torch.equal(vocab.max(x), x.max(-1).values) and not vocab.max(x).requires_grad
    assert torch.equal(vocab.sum(x), x.sum(-1)) and vocab.sum(x).requires_grad
    assert vocab.spread(x) is x
    taken = vocab.take(x, ids)
    assert torch.equal(taken[:, 0], x[:, 0, [4, 0]]) and torch.equal(taken[:, 1], x[:, 1, [1, 1]])
    assert vocab.shard == 0
    assert torch.equal(vocab.gather(x), x) and not vocab.gather(x).requires_grad
    large = torch.tensor([[2**60, 2**60 + 1]])
    assert vocab.max(large).tolist() == [2**60 + 1]


def on_all(num_shards: int, x: Tensor, ask: Callable[[Tensor, VocabReducer], Any]) -> Any:
    """The answer about ``x [..., V]`` that all shards and the whole vocabulary agree on."""
    answers = on_shards(num_shards, x.shape[-1], lambda vocab, columns: ask(x[..., columns], vocab))
    expected = ask(x, LocalVocab())
    for answer in answers:
        torch.testing.assert_close(answer, expected, rtol=0, atol=0, equal_nan=True)
    return expected


@pytest.mark.parametrize("num_shards", [2, 3])
def test_argmax_is_the_lowest_of_tied_ids(num_shards: int) -> None:
    x = torch.tensor([[0.0, 1, 2, 2, 0, 2], [5, 5, 5, 5, 5, 5], [0, 0, 0, 0, 0, 1], [-torch.inf] * 6])
    assert on_all(num_shards, x, argmax).tolist() == [2, 0, 5, 0]


@pytest.mark.parametrize("num_shards", [2, 3])
def test_argmax_beside_a_nan_is_the_same_id_on_every_shard(num_shards: int) -> None:
    x = torch.zeros(6, 6)
    x.fill_diagonal_(torch.nan)
    answers = on_shards(num_shards, 6, lambda vocab, columns: argmax(x[:, columns], vocab))
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert bool(((answers[0] >= 0) & (answers[0] < 6)).all())


@pytest.mark.parametrize("num_shards", [2, 3])
@pytest.mark.parametrize("k", [1, 3, 5, 9])  # 3 and 5 exceed a shard's width, 9 the vocabulary's
def test_top_k_chooses_among_the_best_of_every_shard(num_shards: int, k: int) -> None:
    x = torch.tensor([[3.0, 1, 4, 1.5, 5, 9], [6, 5, 4, 3, 2, 1], [-torch.inf, 1, torch.nan, 2, -1, 0]])
    values, ids = on_all(num_shards, x, lambda shard, vocab: top_k(shard, k, vocab))
    expected = x.topk(min(k, 6))
    torch.testing.assert_close((values, ids), (expected.values, expected.indices), equal_nan=True)


@pytest.mark.parametrize("num_shards", [2, 3])
def test_lowest_id_of_no_candidates_is_zero(num_shards: int) -> None:
    is_candidate = torch.tensor([[0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1], [0] * 6], dtype=torch.bool)

    def ask(shard: Tensor, vocab: VocabReducer) -> Tensor:
        return lowest_id(torch.arange(shard.shape[-1]) + vocab.start, shard, vocab)

    assert on_all(num_shards, is_candidate, ask).tolist() == [2, 5, 0]


def test_local_columns_of_a_mask_end_in_padding() -> None:
    mask = torch.tensor([True, False, False, True, False])
    columns = on_shards(4, 8, lambda vocab, _: local_columns(mask, 2, vocab).tolist())
    assert columns == [[True, False], [False, True], [False, True], [True, True]]
    assert local_columns(mask, 6, LocalVocab()).tolist() == [*mask.tolist(), True]
