"""A vocabulary cut into shards gives the values and the gradients of the whole one."""

import math
import warnings

import pytest
import torch
from torch import Tensor

from nemo_opdlm.distillation.divergence import (
    DivergenceKind,
    DivergenceSpec,
    FullTarget,
    Tail,
    Target,
    TokenTarget,
    TopKTarget,
    token_divergence,
    top_k_target,
)
from nemo_opdlm.testing.threaded_vocab import ThreadedVocab, on_shards
from nemo_opdlm.vocab import LocalVocab

T, V = 5, 12
CASES = [("nll", 0, "tail_bucket")] + [
    (kind, top_k, tail)
    for kind in ("forward_kl", "reverse_kl", "mixed", "jsd")
    for top_k, tail in [(0, "tail_bucket"), (3, "partial"), (3, "tail_bucket"), (3, "renormalize"), (7, "tail_bucket")]
]


class ForgetsToSpread(ThreadedVocab):
    def spread(self, x: Tensor) -> Tensor:
        return x


def spec_of(kind: str, top_k: int, tail: str) -> DivergenceSpec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DivergenceSpec(DivergenceKind(kind), reverse_weight=0.3, jsd_alpha=0.2, top_k=top_k, tail=Tail(tail))


def logits_with_padding(seed: int, dtype: torch.dtype) -> Tensor:
    logits = 2 * torch.randn(T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[:, -2:] = -math.inf  # rows added by vocabulary padding
    return logits.to(dtype)


def run_divergence(student: Tensor, teacher: Tensor, spec: DivergenceSpec, vocab: ThreadedVocab, columns: slice):  # noqa: ANN201
    """Values and this shard's gradient, with a weight per token as the loss has one."""
    target: Target
    if spec.kind == DivergenceKind.nll:
        target = TokenTarget(teacher.argmax(-1))
    elif spec.top_k:
        target = top_k_target(teacher[:, columns], spec.top_k, vocab)
    else:
        target = FullTarget(teacher[:, columns])
    logits = student[:, columns].clone().requires_grad_()
    values = token_divergence(logits, target, spec, vocab)
    (values * torch.arange(1, T + 1)).sum().backward()
    return values.detach(), logits.grad


@pytest.mark.parametrize("num_shards", [2, 3])
@pytest.mark.parametrize(("kind", "top_k", "tail"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 2e-6)])
def test_sharded_equals_unsharded(
    kind: str, top_k: int, tail: str, num_shards: int, dtype: torch.dtype, tolerance: float
) -> None:
    student, teacher = logits_with_padding(0, dtype), logits_with_padding(1, dtype)
    spec = spec_of(kind, top_k, tail)
    values, grad = run_divergence(student, teacher, spec, LocalVocab(), slice(0, V))
    shards = on_shards(num_shards, V, lambda vocab, columns: run_divergence(student, teacher, spec, vocab, columns))
    for shard_values, _ in shards:
        torch.testing.assert_close(shard_values, values, rtol=tolerance, atol=tolerance)
    shard_grads = torch.cat([shard_grad for _, shard_grad in shards], -1)
    assert shard_grads.isfinite().all()
    torch.testing.assert_close(shard_grads, grad, rtol=tolerance, atol=5 * tolerance)


def test_the_comparison_notices_a_normaliser_that_is_not_spread() -> None:
    # Right values, wrong gradients: the trap that makes comparing values alone worthless.
    student, teacher = logits_with_padding(0, torch.float64), logits_with_padding(1, torch.float64)
    spec = spec_of("reverse_kl", 0, "tail_bucket")
    values, grad = run_divergence(student, teacher, spec, LocalVocab(), slice(0, V))
    shards = on_shards(
        2, V, lambda vocab, columns: run_divergence(student, teacher, spec, vocab, columns), vocab_class=ForgetsToSpread
    )
    torch.testing.assert_close(shards[0][0], values)
    assert (torch.cat([shard_grad for _, shard_grad in shards], -1) - grad).abs().max() > 0.1


@pytest.mark.parametrize("num_shards", [2, 3])
@pytest.mark.parametrize("k", [1, 4, 7, 10])  # 7 and 10 exceed a shard's width
def test_sharded_top_k_target_equals_unsharded(num_shards: int, k: int) -> None:
    teacher = logits_with_padding(2, torch.float32)
    expected = top_k_target(teacher, k, LocalVocab())
    targets: list[TopKTarget] = on_shards(
        num_shards, V, lambda vocab, columns: top_k_target(teacher[:, columns], k, vocab)
    )
    for target in targets:
        assert torch.equal(target.token_ids, expected.token_ids)
        torch.testing.assert_close(target.log_probs, expected.log_probs)
        torch.testing.assert_close(target.tail_log_prob, expected.tail_log_prob)


def test_sharded_top_k_target_refuses_more_than_the_whole_vocabulary() -> None:
    with pytest.raises(ValueError, match=rf"divergence_top_k={V + 1} .*at most the {V} rows"):
        on_shards(
            3, V, lambda vocab, columns: top_k_target(logits_with_padding(3, torch.float32)[:, columns], V + 1, vocab)
        )


def test_a_shard_that_lies_wholly_inside_the_top_k_has_no_share_in_the_tail() -> None:
    teacher = torch.arange(V, 0, -1, dtype=torch.float64).expand(T, V)  # the top 4 are exactly the first of 3 shards
    student, spec = logits_with_padding(4, torch.float64), spec_of("forward_kl", 4, "tail_bucket")
    values, grad = run_divergence(student, teacher, spec, LocalVocab(), slice(0, V))
    shards = on_shards(3, V, lambda vocab, columns: run_divergence(student, teacher, spec, vocab, columns))
    torch.testing.assert_close(shards[0][0], values)
    torch.testing.assert_close(torch.cat([shard_grad for _, shard_grad in shards], -1), grad)
