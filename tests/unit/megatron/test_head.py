"""The LM head on gathered rows."""

import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_opdlm.diffusion.proposal import log_confidence
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
from nemo_opdlm.megatron import head as head_module
from nemo_opdlm.megatron.head import LMHead, RevealedTokens, token_losses
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.memory import AllocationProfile
from nemo_opdlm.vocab import LocalVocab


def make_head(**changes: object) -> LMHead:
    return LMHead(tiny.random_network(tiny.architecture(**changes), initialize()))


def every_formula() -> list[DivergenceSpec]:
    """Every divergence over every support and tail."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # combinations whose optimum is not the teacher
        return [DivergenceSpec(DivergenceKind.nll)] + [
            DivergenceSpec(kind, reverse_weight=0.3, jsd_alpha=0.2, top_k=top_k, tail=tail)
            for kind in DivergenceKind
            if kind is not DivergenceKind.nll
            for top_k, tail in [(0, Tail.tail_bucket), *itertools.product((5,), Tail)]
        ]


def target_for(spec: DivergenceSpec, teacher_logits: Tensor) -> Target:
    if spec.kind is DivergenceKind.nll:
        return TokenTarget(teacher_logits.argmax(-1))
    return top_k_target(teacher_logits, spec.top_k, LocalVocab()) if spec.top_k else FullTarget(teacher_logits)


def name_of(spec: DivergenceSpec) -> str:
    return f"{spec.kind.value}-{spec.top_k}-{spec.tail.value}"


@pytest.mark.parametrize("spec", every_formula(), ids=name_of)
def test_loss_and_gradients_are_those_of_autograd_in_fp64(
    spec: DivergenceSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LMHead, "chunk_rows", lambda head, spec: 3)
    head, weights = make_head(), torch.linspace(0.1, 2, 10)
    hidden, teacher_logits = torch.randn(10, 32, requires_grad=True), 2 * torch.randn(10, 48)
    target = target_for(spec, teacher_logits)
    losses = token_losses(head, hidden, lambda a, b: target.index(slice(a, b)), spec, weights)
    (0.7 * losses.loss_sum).backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden, head.model.head_weight())]
    divergence = token_divergence(exact[0] @ exact[1].T, target_for(spec, teacher_logits.double()), spec, LocalVocab())
    (0.7 * (divergence * weights).sum()).backward()
    torch.testing.assert_close(losses.divergence.double(), divergence.detach(), rtol=1e-5, atol=1e-5)
    assert not losses.divergence.requires_grad
    for found, expected in zip((hidden.grad, head.model.head_weight().grad), exact, strict=True):
        assert found is not None and expected.grad is not None
        assert (found - expected.grad).abs().max() <= 1e-5 * expected.grad.abs().max()


def test_a_frozen_head_and_fixed_hidden_states_have_no_gradient() -> None:
    head, hidden, target = make_head(), torch.randn(4, 32, requires_grad=True), TokenTarget(torch.arange(4))
    spec = DivergenceSpec(DivergenceKind.nll)
    both = token_losses(head, hidden, lambda a, b: target, spec, torch.ones(4))
    both.loss_sum.backward()
    (of_hidden, of_head), weight = (hidden.grad, head.model.head_weight().grad), head.model.head_weight()
    hidden.grad = weight.grad = None
    token_losses(head, hidden.detach(), lambda a, b: target, spec, torch.ones(4)).loss_sum.backward()
    assert hidden.grad is None and torch.equal(weight.grad, of_head)
    weight.grad = None
    weight.requires_grad_(False)
    token_losses(head, hidden, lambda a, b: target, spec, torch.ones(4)).loss_sum.backward()
    assert weight.grad is None and torch.equal(hidden.grad, of_hidden)


def test_a_head_in_bf16_adds_its_gradient_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    network = tiny.random_network(tiny.architecture(), initialize(), options=ModelOptions(params_dtype=torch.bfloat16))
    head, target = LMHead(network), TokenTarget(torch.zeros(2000, dtype=torch.int64))
    hidden = torch.randn(1, 32).bfloat16().expand(2000, -1)  # what bf16 would stop to add up after some hundred rows

    def gradient(num_rows: int) -> Tensor:
        monkeypatch.setattr(LMHead, "chunk_rows", lambda head, spec: num_rows)
        weight, spec = head.model.head_weight(), DivergenceSpec(DivergenceKind.nll)
        weight.grad = None
        token_losses(head, hidden, lambda a, b: target.index(slice(a, b)), spec, torch.ones(2000)).loss_sum.backward()
        return weight.grad.float()

    one_by_one, at_once = gradient(1), gradient(2000)
    assert (one_by_one - at_once).abs().max() <= 0.01 * at_once.abs().max()


@pytest.mark.parametrize(
    "spec",
    [*(DivergenceSpec(kind) for kind in DivergenceKind), DivergenceSpec(DivergenceKind.jsd, top_k=5)],
    ids=name_of,
)
def test_working_memory_is_flat_in_vocabulary_and_tokens(spec: DivergenceSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    budget = 2**27
    monkeypatch.setitem(head_module.CHUNK_BYTES, "cpu", budget)

    def working_memory(vocab_size: int, num_tokens: int) -> int:
        head = make_head(vocab_size=vocab_size, hidden_size=8)
        hidden = torch.randn(num_tokens, 8, requires_grad=True)

        def target_of(start: int, stop: int) -> Target:
            return target_for(spec, hidden.detach()[start:stop] @ head.model.head_weight().detach().T)

        with AllocationProfile() as profile:
            token_losses(head, hidden, target_of, spec, torch.ones(num_tokens)).loss_sum.backward()
        # The gradients themselves are no working memory.
        return profile.peak_bytes - (head.model.head_weight().numel() + hidden.numel()) * 4

    small, large, more_tokens = working_memory(2**15, 256), working_memory(2**18, 64), working_memory(2**15, 512)
    assert 0.9 * budget <= small <= 1.01 * budget
    assert abs(large / small - 1) <= 0.1 and abs(more_tokens / small - 1) <= 0.01, (small, large, more_tokens)


def test_rows_added_by_vocabulary_padding_have_no_probability() -> None:
    head = make_head()
    head.model.arch = replace(head.model.arch, vocab_size=45)  # 48 rows, three of them padding
    logits = head.logits(torch.randn(4, 32))
    assert (
        logits.shape == (4, 48) and bool((logits[:, 45:] == -torch.inf).all()) and bool(logits[:, :45].isfinite().all())
    )
    target = FullTarget(head.logits(torch.randn(4, 32)))
    losses = token_losses(
        head, torch.randn(4, 32, requires_grad=True), lambda a, b: target, DivergenceSpec(), torch.ones(4)
    )
    losses.loss_sum.backward()
    assert bool(losses.divergence.isfinite().all())
    assert not head.model.head_weight().grad[45:].any()


def test_tied_and_own_heads_read_their_weights_in_place() -> None:
    for tied in (True, False):
        head = make_head(share_embeddings_and_output_weights=tied)
        hidden = torch.randn(2, 32)
        table = head.model[0].embedding.word_embeddings.weight if tied else head.model[0].output_layer.weight
        with torch.no_grad():
            table.mul_(2)
        torch.testing.assert_close(head.logits(hidden), hidden @ table.T)


def test_agreement_means_the_same_most_likely_token_for_every_kind_of_target() -> None:
    head = make_head()
    hidden = torch.randn(50, 32)
    teacher, student = head.logits(torch.randn(50, 32)), head.logits(hidden)
    teacher[:25] = student[:25]
    expected = teacher.argmax(-1) == student.argmax(-1)
    assert 25 <= int(expected.sum()) < 50
    for kind, target in (
        (DivergenceSpec(), FullTarget(teacher)),
        (DivergenceSpec(top_k=3), top_k_target(teacher, 3, LocalVocab())),
        (DivergenceSpec(DivergenceKind.nll), TokenTarget(teacher.argmax(-1))),
    ):
        losses = token_losses(head, hidden, lambda a, b, t=target: t.index(slice(a, b)), kind, torch.ones(50))  # type: ignore[misc]
        assert torch.equal(losses.agrees, expected)


@pytest.mark.parametrize("chunk_rows", [1, 3, 50])
def test_the_gap_to_the_rollout_excludes_what_it_never_proposes_and_is_computed_once(
    chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LMHead, "chunk_rows", lambda head, spec: chunk_rows)
    calls: list[Tensor] = []
    monkeypatch.setattr(head_module, "log_confidence", lambda *args: calls.append(args[1]) or log_confidence(*args))
    head, hidden = make_head(), torch.randn(20, 32, requires_grad=True)
    forbidden = torch.arange(48) % 5 == 0
    rows, confidence = torch.tensor([0, 1, 2, 3, 7, 11, 19]), torch.tensor([0.1, 0.5, 0.2, 1.0, 0.3, 0.9, 0.8])
    token_ids = torch.tensor([1, 4, 47, 3, 2, 11, 6])
    target = TokenTarget(torch.arange(20))
    losses = token_losses(
        head,
        hidden,
        lambda start, stop: target.index(slice(start, stop)),
        DivergenceSpec(DivergenceKind.nll),
        torch.ones(20),
        RevealedTokens(rows, token_ids, confidence, forbidden),
    )
    losses.loss_sum.backward()
    log_probs = head.logits(hidden)[:, ~forbidden].log_softmax(-1)
    column = (~forbidden).cumsum(0)[token_ids] - 1
    torch.testing.assert_close(losses.logprob_gap, (log_probs[rows, column] - confidence.log()).abs())
    assert not losses.logprob_gap.requires_grad
    assert torch.equal(torch.cat(calls), token_ids), "nothing is measured again in the backward pass"


def test_without_supervised_tokens_the_backward_pass_still_runs() -> None:
    head = make_head()
    hidden = torch.randn(3, 32, requires_grad=True)
    losses = token_losses(
        head, hidden[:0], lambda a, b: FullTarget(torch.empty(0, 48)), DivergenceSpec(), torch.ones(0)
    )
    assert losses.divergence.shape == losses.agrees.shape == (0,)
    losses.loss_sum.backward()
    assert hidden.grad is not None and not hidden.grad.any()
