"""What a divergence specification refuses, warns of and shows."""

import math
import warnings

import pytest
import torch

from nemo_opdlm.distillation.divergence import (
    DivergenceKind,
    DivergenceSpec,
    FullTarget,
    Tail,
    TokenTarget,
    token_divergence,
    top_k_target,
)
from nemo_opdlm.vocab import LocalVocab


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "kl"}, r"divergence='kl' .*allowed: forward_kl, reverse_kl, mixed, jsd, nll"),
        ({"tail": "zero"}, r"tail='zero' .*allowed: partial, tail_bucket, renormalize"),
        ({"top_k": -1}, r"divergence_top_k=-1 .*allowed: 0"),
        ({"reverse_weight": 1.5}, r"reverse_kl_weight=1.5 .*allowed: 0 to 1"),
        ({"reverse_weight": math.nan}, r"reverse_kl_weight=nan .*allowed"),
        ({"jsd_alpha": 0.0}, r"jsd_alpha=0.0 .*allowed: between 0 and 1"),
        ({"jsd_alpha": 1.0}, r"jsd_alpha=1.0 .*allowed: between 0 and 1"),
        ({"kind": DivergenceKind.nll, "top_k": 16}, r"divergence_top_k=16 .*allowed: 0 with divergence='nll'"),
    ],
)
def test_contradictions_are_refused_by_name(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DivergenceSpec(**arguments)


@pytest.mark.parametrize("kind", [DivergenceKind.reverse_kl, DivergenceKind.mixed])
def test_partial_tail_with_a_reverse_term_warns(kind: DivergenceKind) -> None:
    with pytest.warns(UserWarning, match=rf"divergence='{kind.value}' with tail='partial'.*tail_bucket"):
        DivergenceSpec(kind, top_k=16, tail=Tail.partial)


def test_sound_combinations_do_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in DivergenceKind:
            DivergenceSpec(kind, tail=Tail.partial)  # full support: the tail has no effect, for nll neither
        for kind in (DivergenceKind.forward_kl, DivergenceKind.jsd):
            DivergenceSpec(kind, top_k=16, tail=Tail.partial)
        for kind in set(DivergenceKind) - {DivergenceKind.nll}:
            DivergenceSpec(kind, top_k=16, tail=Tail.tail_bucket)


def test_a_target_of_the_wrong_kind_is_refused() -> None:
    vocab = LocalVocab()
    student, teacher = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0))
    top, full, token = top_k_target(teacher, 4, vocab), FullTarget(teacher), TokenTarget(teacher.argmax(-1))
    for target, spec in [
        (top, DivergenceSpec(DivergenceKind.reverse_kl)),  # every reverse term outside K would be +inf
        (top, DivergenceSpec(DivergenceKind.forward_kl)),
        (full, DivergenceSpec(DivergenceKind.forward_kl, top_k=4)),
        (full, DivergenceSpec(DivergenceKind.nll)),
        (token, DivergenceSpec(DivergenceKind.jsd)),
        (top, DivergenceSpec(DivergenceKind.forward_kl, top_k=3)),
    ]:
        with pytest.raises(ValueError, match=r"divergence.*allowed"):
            token_divergence(student, target, spec, vocab)


def test_formula_tells_support_and_weights() -> None:
    assert DivergenceSpec(DivergenceKind.forward_kl).formula == "sum phi (ln phi - ln q), over the full vocabulary"
    assert "w = 0.3" in DivergenceSpec(DivergenceKind.mixed, reverse_weight=0.3).formula
    assert DivergenceSpec(DivergenceKind.forward_kl, top_k=16, tail=Tail.partial).formula.endswith(
        "top 16 ids, nothing renormalised, no tail"
    )
    assert DivergenceSpec(DivergenceKind.nll).formula == "-ln q at the clean token"
