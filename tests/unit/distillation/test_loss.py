"""Weights and counts: one global mean, however the batch is cut."""

import pytest
import torch
from torch import Tensor

from nemo_opdlm.distillation.loss import Normalization, token_weights

SEQUENCE, TOKEN = Normalization.sequence, Normalization.token


def random_batch(seed: int, batch: int = 6, copies: int = 3, length: int = 16) -> tuple[Tensor, Tensor, Tensor]:
    """(loss_mask, num_states, divergence): some copies unused, some used without a supervised position."""
    generator = torch.Generator().manual_seed(seed)
    num_states = torch.randint(1, copies + 1, (batch,), generator=generator)
    loss_mask = torch.rand(batch, copies, length, generator=generator) < 0.4
    loss_mask &= (torch.arange(copies) < num_states[:, None])[..., None]
    loss_mask[0, 0] = False
    return loss_mask, num_states, torch.rand(batch, copies, length, generator=generator)


def loss_of(loss_mask: Tensor, num_states: Tensor, divergence: Tensor, normalization: Normalization) -> Tensor:
    weights, count = token_weights(loss_mask, num_states, normalization)
    return (weights * divergence).sum() / count


def test_sequence_is_the_mean_over_copies_of_the_mean_over_tokens() -> None:
    loss_mask, num_states, divergence = random_batch(0)
    means = []
    for b in range(len(num_states)):
        for s in range(int(num_states[b])):
            values = divergence[b, s][loss_mask[b, s]].tolist()
            means.append(sum(values) / len(values) if values else 0.0)
    assert loss_of(loss_mask, num_states, divergence, SEQUENCE).item() == pytest.approx(sum(means) / len(means))
    assert 0.0 in means


def test_token_is_the_mean_over_all_supervised_tokens() -> None:
    loss_mask, num_states, divergence = random_batch(1)
    values = divergence[loss_mask].tolist()
    assert loss_of(loss_mask, num_states, divergence, TOKEN).item() == pytest.approx(sum(values) / len(values))


def test_an_empty_copy_is_counted_by_sequence_only() -> None:
    loss_mask = torch.tensor([[[True, True]], [[False, False]]])
    num_states = torch.tensor([1, 1])
    weights, count = token_weights(loss_mask, num_states, SEQUENCE)
    assert weights.tolist() == [[[0.5, 0.5]], [[0.0, 0.0]]] and count.item() == 2
    weights, count = token_weights(loss_mask, num_states, TOKEN)
    assert weights.tolist() == [[[1.0, 1.0]], [[0.0, 0.0]]] and count.item() == 2


def test_an_unused_copy_is_not_counted() -> None:
    loss_mask = torch.tensor([[[True, False], [False, False]]])
    assert token_weights(loss_mask, torch.tensor([1]), SEQUENCE)[1].item() == 1


@pytest.mark.parametrize("normalization", list(Normalization))
def test_the_loss_does_not_depend_on_how_the_batch_is_cut(normalization: Normalization) -> None:
    loss_mask, num_states, divergence = random_batch(2)
    whole = loss_of(loss_mask, num_states, divergence, normalization)
    for cut in ([1] * 6, [4, 2], [1, 5], [3, 3]):
        total, counts = torch.tensor(0.0), torch.tensor(0)
        for mask, states, values in zip(*(x.split(cut) for x in (loss_mask, num_states, divergence)), strict=True):
            weights, count = token_weights(mask, states, normalization)
            total, counts = total + (weights * values).sum(), counts + count
        torch.testing.assert_close(total / counts, whole)


@pytest.mark.parametrize("normalization", list(Normalization))
def test_copies_of_one_rollout_equal_one_row_each(normalization: Normalization) -> None:
    loss_mask, _, divergence = random_batch(3)
    num_states = torch.full((6,), 3)
    rows = (loss_mask.reshape(18, 1, 16), torch.ones(18, dtype=torch.int64), divergence.reshape(18, 1, 16))
    torch.testing.assert_close(loss_of(loss_mask, num_states, divergence, normalization), loss_of(*rows, normalization))


@pytest.mark.parametrize("normalization", list(Normalization))
def test_only_supervised_positions_weigh(normalization: Normalization) -> None:
    loss_mask, num_states, _ = random_batch(4)
    weights, count = token_weights(loss_mask, num_states, normalization)
    assert weights.dtype == torch.float32 and count.dtype == torch.int64 and count.dim() == 0
    assert torch.equal(weights > 0, loss_mask)


def test_an_unknown_normalization_or_shape_is_refused() -> None:
    loss_mask, num_states, _ = random_batch(5)
    with pytest.raises(ValueError, match=r"normalization='row' .*allowed: sequence, token"):
        token_weights(loss_mask, num_states, "row")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"loss_mask\.shape=\(6, 16\) .*\[B, C, L\]"):
        token_weights(loss_mask[:, 0], num_states, SEQUENCE)
    with pytest.raises(ValueError, match=r"num_states\.shape=\(5,\)"):
        token_weights(loss_mask, num_states[:5], SEQUENCE)
