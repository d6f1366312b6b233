"""The one-rank vocabulary: plain reductions, and a maximum that no gradient flows through."""

import torch

from nemo_opdlm.vocab import LocalVocab, VocabReducer


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
