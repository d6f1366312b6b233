"""The LM head on gathered rows."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from nemo_opdlm.diffusion.proposal import log_confidence
from nemo_opdlm.distillation.divergence import DivergenceKind, DivergenceSpec, FullTarget, TokenTarget, top_k_target
from nemo_opdlm.megatron import head as head_module
from nemo_opdlm.megatron.head import LMHead, RevealedTokens, token_losses
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
    losses = token_losses(head, torch.randn(4, 32, requires_grad=True), lambda a, b: target, DivergenceSpec(), torch.ones(4))
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
    monkeypatch.setattr(LMHead, "chunk_rows", chunk_rows)
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
    losses = token_losses(head, hidden[:0], lambda a, b: FullTarget(torch.empty(0, 48)), DivergenceSpec(), torch.ones(0))
    assert losses.divergence.shape == losses.agrees.shape == (0,)
    losses.loss_sum.backward()
    assert hidden.grad is not None and not hidden.grad.any()
