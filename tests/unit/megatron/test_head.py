"""The LM head on gathered rows."""

from dataclasses import replace

import torch

from nemo_opdlm.distillation.divergence import DivergenceKind, DivergenceSpec, FullTarget, TokenTarget, top_k_target
from nemo_opdlm.megatron.head import LMHead, token_losses
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.testing import tiny
from nemo_opdlm.vocab import LocalVocab


def make_head(**changes: object) -> LMHead:
    return LMHead(tiny.random_network(tiny.architecture(**changes), initialize()))


def test_rows_added_by_vocabulary_padding_have_no_probability() -> None:
    head = make_head()
    head.model.arch = replace(head.model.arch, vocab_size=45)  # 48 rows, three of them padding
    logits = head.logits(torch.randn(4, 32))
    assert logits.shape == (4, 48) and bool((logits[:, 45:] == -torch.inf).all()) and bool(logits[:, :45].isfinite().all())
    target = FullTarget(head.logits(torch.randn(4, 32)))
    losses = token_losses(head, torch.randn(4, 32, requires_grad=True), lambda a, b: target, DivergenceSpec())
    losses.divergence.sum().backward()
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
        losses = token_losses(head, hidden, lambda a, b, t=target: t.index(slice(a, b)), kind)  # type: ignore[misc]
        assert torch.equal(losses.agrees, expected)


def test_without_supervised_tokens_the_backward_pass_still_runs() -> None:
    head = make_head()
    hidden = torch.randn(3, 32, requires_grad=True)
    losses = token_losses(head, hidden[:0], lambda a, b: FullTarget(torch.empty(0, 48)), DivergenceSpec())
    assert losses.divergence.shape == losses.agrees.shape == (0,)
    losses.divergence.sum().backward()
    assert hidden.grad is not None and not hidden.grad.any()
