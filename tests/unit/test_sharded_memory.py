"""No shard ever holds logits, or anything else, of the whole vocabulary for all its tokens."""

import itertools
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_opdlm.diffusion.proposal import SamplingParams, propose
from nemo_opdlm.distillation.divergence import (
    DivergenceKind,
    DivergenceSpec,
    FullTarget,
    Tail,
    Target,
    TokenTarget,
    token_divergence,
    top_k_target,
)
from nemo_opdlm.testing.threaded_vocab import on_shards
from nemo_opdlm.vocab import VocabReducer

T, V, SHARDS = 8, 6144, 3
WIDTH = V // SHARDS


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that an operator returns inside the context."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def assert_stays_local(body: Callable[[Tensor, VocabReducer], None]) -> None:
    """``body(local_logits, vocab)`` makes no tensor larger than a shard's logits, one spare column allowed."""
    logits = torch.randn(T, V, generator=torch.Generator().manual_seed(0))

    def on_one(vocab: VocabReducer, columns: slice) -> int:
        mine = logits[:, columns].clone().requires_grad_()
        with LargestTensor() as largest:
            body(mine, vocab)
        return largest.numel

    for numel in on_shards(SHARDS, V, on_one):
        assert T * WIDTH <= numel <= T * (WIDTH + 1)


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("top_k", "top_p"), itertools.product((0, 50), (1.0, 0.9)))
def test_proposals_stay_local(temperature: float, top_k: int, top_p: float) -> None:
    params, nothing = SamplingParams(temperature, top_k, top_p), torch.zeros(WIDTH, dtype=torch.bool)
    assert_stays_local(lambda logits, vocab: _propose(logits, params, nothing, vocab))


@torch.no_grad()
def _propose(logits: Tensor, params: SamplingParams, forbidden: Tensor, vocab: VocabReducer) -> None:
    propose(logits, torch.linspace(0, 0.99, T), params, forbidden, vocab)


@pytest.mark.parametrize("kind", list(DivergenceKind))
@pytest.mark.parametrize(("top_k", "tail"), [(0, Tail.tail_bucket), *itertools.product((16,), Tail)])
def test_divergences_stay_local(kind: DivergenceKind, top_k: int, tail: Tail) -> None:
    if kind == DivergenceKind.nll and top_k:
        pytest.skip("nll has no teacher")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        spec = DivergenceSpec(kind, top_k=top_k, tail=tail)

    def body(logits: Tensor, vocab: VocabReducer) -> None:
        teacher = 2 * logits.detach()
        target: Target = TokenTarget(torch.arange(T) * 700) if kind == DivergenceKind.nll else FullTarget(teacher)
        if top_k:
            target = top_k_target(teacher, top_k, vocab)
        values = token_divergence(logits, target, spec, vocab)
        values.sum().backward()
        assert math.isfinite(float(values.detach().sum()))

    assert_stays_local(body)


def test_the_measure_notices_a_gathered_vocabulary() -> None:
    with pytest.raises(AssertionError):
        assert_stays_local(lambda logits, vocab: vocab.gather(logits).sum())
