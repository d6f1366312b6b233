"""The teacher's most likely ids, and everything else as one tail."""

import math

import pytest
import torch

from nemo_opdlm.distillation.divergence import TopKTarget, top_k_target
from nemo_opdlm.vocab import LocalVocab

VOCAB = LocalVocab()
T, V = 5, 11


def random_logits(seed: int) -> torch.Tensor:
    return 2 * torch.randn(T, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_top_k_target_holds_the_most_likely_ids_and_the_rest_as_a_tail() -> None:
    teacher = random_logits(45)
    target = top_k_target(teacher, 4, VOCAB)
    expected = teacher.log_softmax(-1).topk(4)
    assert torch.equal(target.token_ids, expected.indices)
    torch.testing.assert_close(target.log_probs, expected.values)
    torch.testing.assert_close(target.tail_log_prob, (1 - expected.values.exp().sum(-1)).log())


def test_top_k_target_of_the_whole_vocabulary_has_no_tail() -> None:
    target = top_k_target(random_logits(46), V, VOCAB)
    assert torch.equal(target.token_ids.sort(-1).values, torch.arange(V).expand(T, V))
    assert (target.tail_log_prob == -math.inf).all()


def test_top_k_target_of_narrow_logits_is_fp32_and_its_tail_precise() -> None:
    teacher = torch.tensor([[40.0, 1.0, 0.0, -1.0]], dtype=torch.bfloat16)
    target = top_k_target(teacher, 1, VOCAB)
    assert target.token_ids.dtype == torch.int64
    assert target.log_probs.dtype == target.tail_log_prob.dtype == torch.float32
    expected = math.log(sum(math.exp(x - 40) for x in (1.0, 0.0, -1.0)))
    assert target.tail_log_prob.item() == pytest.approx(expected, rel=1e-6)


def test_top_k_target_names_every_id_once_despite_ties_and_nan() -> None:
    teacher = torch.zeros(3, V)
    teacher[1] = -math.inf
    teacher[1, 5] = 0.0
    teacher[2, 4:6] = math.nan
    ids = top_k_target(teacher, 6, VOCAB).token_ids
    assert all(len(set(row)) == 6 and max(row) < V and min(row) >= 0 for row in ids.tolist())
    assert ids[1, 0] == 5 and set(ids[2, :2].tolist()) == {4, 5}


def test_top_k_targets_join_as_they_were_cut() -> None:
    target = top_k_target(random_logits(47), 3, VOCAB)
    joined = TopKTarget.cat([target.index(slice(0, 2)), target.index(torch.tensor([2, 3, 4]))])
    assert torch.equal(joined.token_ids, target.token_ids)
    assert torch.equal(joined.log_probs, target.log_probs)
    assert torch.equal(joined.tail_log_prob, target.tail_log_prob)


@pytest.mark.parametrize("k", [0, -1, V + 1])
def test_top_k_target_refuses_an_impossible_k(k: int) -> None:
    with pytest.raises(ValueError, match=rf"divergence_top_k={k} .*allowed"):
        top_k_target(random_logits(48), k, VOCAB)
