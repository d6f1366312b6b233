"""Divergences against a loop over probabilities, their gradients against closed forms, and the laws they obey."""

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
    token_divergence,
    top_k_target,
)
from nemo_opdlm.vocab import LocalVocab

VOCAB = LocalVocab()
KINDS = ["forward_kl", "reverse_kl", "mixed", "jsd"]
TAILS = ["partial", "tail_bucket", "renormalize"]
SUPPORTS = [(0, "tail_bucket")] + [(k, tail) for tail in TAILS for k in (1, 4)]
T, V = 5, 11


def spec_of(kind: str, top_k: int = 0, tail: str = "tail_bucket", **weights: float) -> DivergenceSpec:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DivergenceSpec(DivergenceKind(kind), top_k=top_k, tail=Tail(tail), **weights)


def random_logits(seed: int, rows: int = T, size: int = V, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(rows, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def target_of(teacher: Tensor, spec: DivergenceSpec) -> Target:
    return top_k_target(teacher, spec.top_k, VOCAB) if spec.top_k else FullTarget(teacher)


def divergence(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor:
    return token_divergence(student, target_of(teacher, spec), spec, VOCAB)


def gradient(student: Tensor, target: Target, spec: DivergenceSpec) -> Tensor:
    student = student.clone().requires_grad_()
    token_divergence(student, target, spec, VOCAB).sum().backward()
    assert student.grad is not None
    return student.grad


# ---- the slow and obvious oracle: probabilities, one outcome after the other


def log_ratio_sum(a: list, b: list) -> float:
    """Sum of a (ln a - ln b), where an outcome with a = 0 counts 0."""
    return sum(x * math.log(x / y) if y > 0 else math.inf for x, y in zip(a, b, strict=True) if x > 0)


def outcomes(phi: list, q: list, spec: DivergenceSpec) -> tuple[list, list]:
    """The probabilities that the divergence is summed over, after the support and the tail were chosen."""
    if not spec.top_k:
        return phi, q
    top = sorted(range(len(phi)), key=lambda v: -phi[v])[: spec.top_k]
    rest = [v for v in range(len(phi)) if v not in top]
    phi_top, q_top = [phi[v] for v in top], [q[v] for v in top]
    if spec.tail == "tail_bucket":
        return phi_top + [sum(phi[v] for v in rest)], q_top + [sum(q[v] for v in rest)]
    if spec.tail == "renormalize":
        return [x / sum(phi_top) for x in phi_top], [x / sum(q_top) for x in q_top]
    return phi_top, q_top


def oracle(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor:
    rows = []
    for z, t in zip(student.tolist(), teacher.tolist(), strict=True):
        q, phi = ([math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in (z, t))
        phi, q = outcomes(phi, q, spec)
        mu = [spec.jsd_alpha * x + (1 - spec.jsd_alpha) * y for x, y in zip(phi, q, strict=True)]
        forward, reverse = log_ratio_sum(phi, q), log_ratio_sum(q, phi)
        rows.append(
            {
                "forward_kl": forward,
                "reverse_kl": reverse,
                "mixed": (1 - spec.reverse_weight) * forward + spec.reverse_weight * reverse,
                "jsd": spec.jsd_alpha * log_ratio_sum(phi, mu) + (1 - spec.jsd_alpha) * log_ratio_sum(q, mu),
            }[spec.kind.value]
        )
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("padding", [[], [0, 7]])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
def test_values_equal_the_oracle(kind: str, top_k: int, tail: str, padding: list) -> None:
    student, teacher = random_logits(0), random_logits(1)
    student[:, padding] = teacher[:, padding] = -math.inf
    spec = spec_of(kind, top_k, tail, reverse_weight=0.3, jsd_alpha=0.2)
    values = divergence(student, teacher, spec)
    torch.testing.assert_close(values, oracle(student, teacher, spec), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
def test_narrow_logits_are_accumulated_in_fp32(kind: str, top_k: int, tail: str, dtype: torch.dtype) -> None:
    student, teacher = (random_logits(seed, size=300).to(dtype) for seed in (4, 5))
    spec = spec_of(kind, top_k, tail)
    values = divergence(student, teacher, spec)
    assert values.dtype == torch.float32
    wide = target_of(teacher, spec)  # ties of narrow logits: both sides must use the same ids
    expected = token_divergence(student.double(), FullTarget(teacher.double()) if top_k == 0 else wide, spec, VOCAB)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)
    assert gradient(student, wide, spec).dtype == dtype


def test_nll_is_the_surprise_at_the_clean_token() -> None:
    student, token_ids = random_logits(6), torch.tensor([0, 3, 10, 3, 7])
    expected = [
        -math.log(math.exp(row[i]) / sum(map(math.exp, row)))
        for row, i in zip(student.tolist(), token_ids, strict=True)
    ]
    values = token_divergence(student, TokenTarget(token_ids), spec_of("nll"), VOCAB)
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float64))
    one_hot = torch.nn.functional.one_hot(token_ids, V)
    grad = gradient(student, TokenTarget(token_ids), spec_of("nll"))
    torch.testing.assert_close(grad, student.softmax(-1) - one_hot)


def test_worked_example() -> None:
    phi, q = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).double(), torch.tensor([[0.45, 0.35, 0.15, 0.05]]).double()
    partial = divergence(q.log(), phi.log(), spec_of("forward_kl", 2, "partial"))
    full = divergence(q.log(), phi.log(), spec_of("forward_kl"))
    assert (round(partial.item(), 3), round(full.item(), 3)) == (-0.093, 0.033)


# ---- gradients


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
def test_gradients_equal_finite_differences(kind: str, top_k: int, tail: str) -> None:
    spec = spec_of(kind, top_k, tail, reverse_weight=0.3, jsd_alpha=0.2)
    target = target_of(random_logits(8, rows=2), spec)
    student = random_logits(7, rows=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_divergence(z, target, spec, VOCAB), (student,))


@pytest.mark.parametrize("kind", KINDS)
def test_no_gradient_reaches_the_teacher(kind: str) -> None:
    spec, teacher = spec_of(kind), random_logits(8, rows=2).requires_grad_()
    student = random_logits(7, rows=2)
    assert not token_divergence(student, target_of(teacher, spec), spec, VOCAB).requires_grad
    token_divergence(student.requires_grad_(), target_of(teacher, spec), spec, VOCAB).sum().backward()
    assert teacher.grad is None and student.grad is not None


def dense(student: Tensor, teacher: Tensor, spec: DivergenceSpec) -> Tensor:
    """The oracle once more, differentiable: plain probabilities, no care for small ones."""
    phi, q = teacher.softmax(-1), student.softmax(-1)
    if spec.top_k:
        ids = phi.topk(spec.top_k).indices
        phi_k, q_k = phi.gather(-1, ids), q.gather(-1, ids)
        if spec.tail == Tail.tail_bucket:
            phi_k, q_k = (torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1) for p in (phi_k, q_k))
        if spec.tail == Tail.renormalize:
            phi_k, q_k = (p / p.sum(-1, keepdim=True) for p in (phi_k, q_k))
        phi, q = phi_k, q_k
    mu = spec.jsd_alpha * phi + (1 - spec.jsd_alpha) * q
    forward, reverse = phi * (phi / q).log(), q * (q / phi).log()
    return {
        "forward_kl": forward,
        "reverse_kl": reverse,
        "mixed": (1 - spec.reverse_weight) * forward + spec.reverse_weight * reverse,
        "jsd": spec.jsd_alpha * phi * (phi / mu).log() + (1 - spec.jsd_alpha) * q * (q / mu).log(),
    }[spec.kind.value].sum(-1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
def test_gradients_equal_the_dense_formula(kind: str, top_k: int, tail: str) -> None:
    spec = spec_of(kind, top_k, tail, reverse_weight=0.3, jsd_alpha=0.2)
    student, teacher = random_logits(9), random_logits(10)
    probe = student.clone().requires_grad_()
    (expected,) = torch.autograd.grad(dense(probe, teacher, spec).sum(), probe)
    actual = gradient(student, target_of(teacher, spec), spec)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("tail", TAILS)
def test_top_k_gradients_equal_the_closed_forms(tail: str) -> None:
    student, teacher, top_k = random_logits(11), random_logits(12), 4
    phi, q = teacher.softmax(-1), student.softmax(-1)
    inside = torch.zeros_like(phi).scatter_(-1, phi.topk(top_k).indices, 1.0)
    phi_mass, q_mass = (phi * inside).sum(-1, keepdim=True), (q * inside).sum(-1, keepdim=True)
    expected = {
        "partial": phi_mass * q - phi * inside,
        "tail_bucket": torch.where(inside == 1, q - phi, q * (phi_mass - q_mass) / (1 - q_mass)),
        "renormalize": (q / q_mass - phi / phi_mass) * inside,
    }[tail]
    spec = spec_of("forward_kl", top_k, tail)
    torch.testing.assert_close(gradient(student, target_of(teacher, spec), spec), expected)


def test_full_gradients_equal_the_closed_forms() -> None:
    student, teacher = random_logits(13), random_logits(14)
    phi, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(gradient(student, FullTarget(teacher), spec_of("forward_kl")), q - phi)
    ratio = (q / phi).log()
    expected = q * (ratio - (q * ratio).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient(student, FullTarget(teacher), spec_of("reverse_kl")), expected)


# ---- outcomes without probability


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
def test_padded_vocabulary_rows_contribute_nothing(kind: str, top_k: int, tail: str) -> None:
    spec = spec_of(kind, top_k, tail)
    student, teacher = random_logits(15), random_logits(16)
    padding = torch.full((T, 3), -math.inf, dtype=torch.float64)
    padded_student, padded_teacher = (torch.cat([x, padding], -1) for x in (student, teacher))
    torch.testing.assert_close(divergence(padded_student, padded_teacher, spec), divergence(student, teacher, spec))
    grad = gradient(padded_student, target_of(padded_teacher, spec), spec)
    torch.testing.assert_close(grad[:, :V], gradient(student, target_of(teacher, spec), spec))
    assert (grad[:, V:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", TAILS)
def test_top_k_may_exceed_the_rows_that_hold_a_token(kind: str, tail: str) -> None:
    student, teacher = random_logits(17), random_logits(18)
    student[:, 4:] = teacher[:, 4:] = -math.inf
    spec = spec_of(kind, 6, tail)
    expected = divergence(student[:, :4], teacher[:, :4], spec_of(kind))
    torch.testing.assert_close(divergence(student, teacher, spec), expected)
    grad = gradient(student, target_of(teacher, spec), spec)
    torch.testing.assert_close(grad[:, :4], gradient(student[:, :4], FullTarget(teacher[:, :4]), spec_of(kind)))
    assert (grad[:, 4:] == 0).all()


@pytest.mark.parametrize("top_k", [0, V])
def test_an_outcome_the_teacher_excludes_is_infinite_only_in_the_reverse_term(top_k: int) -> None:
    student, teacher = random_logits(19), random_logits(20)
    teacher[:, 2] = -math.inf
    for kind in ("forward_kl", "jsd"):
        spec = spec_of(kind, top_k)
        torch.testing.assert_close(divergence(student, teacher, spec), oracle(student, teacher, spec))
        assert gradient(student, target_of(teacher, spec), spec).isfinite().all()
    for kind in ("reverse_kl", "mixed"):
        assert (divergence(student, teacher, spec_of(kind, top_k)) == math.inf).all()
    forward_only = spec_of("mixed", top_k, reverse_weight=0.0)
    torch.testing.assert_close(
        divergence(student, teacher, forward_only), oracle(student, teacher, spec_of("forward_kl", top_k))
    )


@pytest.mark.parametrize("top_k", [0, V])
def test_an_outcome_the_student_excludes_is_infinite_only_in_the_forward_term(top_k: int) -> None:
    student, teacher = random_logits(21), random_logits(22)
    student[:, 2] = -math.inf
    for kind in ("reverse_kl", "jsd"):
        spec = spec_of(kind, top_k)
        torch.testing.assert_close(divergence(student, teacher, spec), oracle(student, teacher, spec))
        grad = gradient(student, target_of(teacher, spec), spec)
        assert grad.isfinite().all() and (grad[:, 2] == 0).all()
    assert (divergence(student, teacher, spec_of("forward_kl", top_k)) == math.inf).all()
    reverse_only = spec_of("mixed", top_k, reverse_weight=1.0)
    torch.testing.assert_close(
        divergence(student, teacher, reverse_only), oracle(student, teacher, spec_of("reverse_kl", top_k))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_far_apart_fp32_logits_stay_finite(kind: str) -> None:
    student = torch.tensor([[90.0, -90.0, 0.0, -300.0], [0.0, 1e4, -1e4, 3.0]])
    teacher = torch.tensor([[-90.0, 90.0, -300.0, 0.0], [1e4, 0.0, -1e4, 3.0]])
    for top_k, tail in ((0, "tail_bucket"), (1, "tail_bucket"), (2, "partial"), (2, "renormalize")):
        spec = spec_of(kind, top_k, tail)
        assert divergence(student, teacher, spec).isfinite().all()
        assert gradient(student, target_of(teacher, spec), spec).isfinite().all()


def test_the_tail_keeps_its_digits_where_the_top_holds_nearly_everything() -> None:
    # Outside K the student has 1e-11: 1 - Q is 0 in fp32, and ln(1 - Q) would be -inf.
    student, teacher = torch.tensor([[25.0, -0.5, 0.0, 0.5]]), torch.tensor([[2.0, 0.0, -1.0, 0.5]])
    spec = spec_of("forward_kl", 1, "tail_bucket")
    assert student.softmax(-1)[0, 0] == 1
    value = divergence(student, teacher, spec).double()
    torch.testing.assert_close(value, oracle(student, teacher, spec), rtol=1e-6, atol=0.0)


# ---- laws


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", ["tail_bucket", "renormalize"])
def test_proper_divergences_are_never_negative_and_zero_at_the_teacher(kind: str, tail: str) -> None:
    student, teacher = random_logits(23, rows=64), random_logits(24, rows=64)
    for top_k in (0, 1, 3, V):
        spec = spec_of(kind, top_k, tail)
        assert (divergence(student, teacher, spec) >= -1e-14).all()
        torch.testing.assert_close(divergence(teacher, teacher, spec), torch.zeros(64, dtype=torch.float64))
        torch.testing.assert_close(gradient(teacher, target_of(teacher, spec), spec), torch.zeros_like(teacher))


@pytest.mark.parametrize("kind", KINDS)
def test_tail_bucket_grows_with_k_up_to_the_full_divergence(kind: str) -> None:
    student, teacher = random_logits(25, rows=64), random_logits(26, rows=64)
    values = torch.stack([divergence(student, teacher, spec_of(kind, k)) for k in range(1, V + 1)])
    full = divergence(student, teacher, spec_of(kind))
    assert (values.diff(dim=0) >= -1e-14).all()
    torch.testing.assert_close(values[-2], full)  # one outcome alone in the bucket
    torch.testing.assert_close(values[-1], full)


@pytest.mark.parametrize("tail", ["partial", "renormalize"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tail_mode_is_the_full_divergence_at_k_equal_to_the_vocabulary(kind: str, tail: str) -> None:
    student, teacher = random_logits(27), random_logits(28)
    full = divergence(student, teacher, spec_of(kind))
    torch.testing.assert_close(divergence(student, teacher, spec_of(kind, V, tail)), full)


def test_partial_may_be_negative_but_not_below_its_bound() -> None:
    teacher = random_logits(29, rows=64)
    spec = spec_of("forward_kl", 3, "partial")
    top = target_of(teacher, spec)
    mass = top.log_probs.exp().sum(-1)
    values = divergence(random_logits(30, rows=64), teacher, spec)
    bound = mass * mass.log()
    assert (values >= bound).all() and (bound >= -1 / math.e).all()
    # ... and the teacher renormalised on K, which leaves the student no tail at all, reaches it.
    outside = torch.ones_like(teacher, dtype=torch.bool).scatter_(-1, top.token_ids, False)
    optimum = teacher.masked_fill(outside, -80.0)
    torch.testing.assert_close(divergence(optimum, teacher, spec), bound)
    assert (bound < 0).all()


def test_partial_with_reverse_kl_leaks_to_its_degenerate_optimum() -> None:
    teacher = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64)
    leaked = torch.tensor([[0.5 / math.e, 0.3 / math.e, 0.4, 0.6 - 0.8 / math.e]], dtype=torch.float64)
    spec = spec_of("reverse_kl", 2, "partial")
    grad = gradient(leaked.log(), target_of(teacher.log(), spec), spec)
    torch.testing.assert_close(grad, torch.zeros_like(leaked), rtol=0, atol=1e-15)
    assert divergence(leaked.log(), teacher.log(), spec) < divergence(teacher.log(), teacher.log(), spec)


def test_jsd_is_symmetric_at_one_half_and_bounded() -> None:
    student, teacher = random_logits(31, scale=9.0), random_logits(32, scale=9.0)
    spec = spec_of("jsd")
    torch.testing.assert_close(divergence(student, teacher, spec), divergence(teacher, student, spec))
    assert (divergence(student, teacher, spec) <= math.log(2)).all()


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_mixed_lies_between_forward_and_reverse(weight: float) -> None:
    student, teacher = random_logits(33), random_logits(34)
    forward, reverse = (divergence(student, teacher, spec_of(kind)) for kind in ("forward_kl", "reverse_kl"))
    mixed = divergence(student, teacher, spec_of("mixed", reverse_weight=weight))
    torch.testing.assert_close(mixed, (1 - weight) * forward + weight * reverse)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
def test_the_order_of_the_vocabulary_does_not_matter(kind: str, top_k: int, tail: str) -> None:
    student, teacher, spec = random_logits(35), random_logits(36), spec_of(kind, top_k, tail)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(0))
    permuted = divergence(student[:, order], teacher[:, order], spec)
    torch.testing.assert_close(permuted, divergence(student, teacher, spec))
    grad = gradient(student, target_of(teacher, spec), spec)
    torch.testing.assert_close(gradient(student[:, order], target_of(teacher[:, order], spec), spec), grad[:, order])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
def test_a_constant_added_to_all_logits_changes_nothing(kind: str, top_k: int, tail: str) -> None:
    student, teacher, spec = random_logits(37), random_logits(38), spec_of(kind, top_k, tail)
    torch.testing.assert_close(divergence(student + 50, teacher - 30, spec), divergence(student, teacher, spec))


@pytest.mark.parametrize("kind", [*KINDS, "nll"])
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
def test_chunked_rows_equal_unchunked_rows(kind: str, top_k: int, tail: str) -> None:
    spec = spec_of(kind, 0 if kind == "nll" else top_k, tail)
    student, teacher = random_logits(39, rows=7).float(), random_logits(40, rows=7).float()
    target = TokenTarget(teacher.argmax(-1)) if kind == "nll" else target_of(teacher, spec)
    chunks = [slice(0, 3), slice(3, 4), slice(4, 7)]
    values = torch.cat([token_divergence(student[c], target.index(c), spec, VOCAB) for c in chunks])
    assert torch.equal(values, token_divergence(student, target, spec, VOCAB))
    grads = torch.cat([gradient(student[c], target.index(c), spec) for c in chunks])
    assert torch.equal(grads, gradient(student, target, spec))


def test_no_supervised_token_is_an_empty_result_with_a_gradient() -> None:
    for top_k in (0, 3):
        spec = spec_of("forward_kl", top_k)
        target = target_of(random_logits(41, rows=0), spec)
        assert gradient(random_logits(42, rows=0), target, spec).shape == (0, V)


def test_the_teacher_gets_no_gradient() -> None:
    teacher = random_logits(43).requires_grad_()
    student = random_logits(44).requires_grad_()
    token_divergence(student, FullTarget(teacher), spec_of("jsd"), VOCAB).sum().backward()
    assert teacher.grad is None and not top_k_target(teacher, 3, VOCAB).log_probs.requires_grad
