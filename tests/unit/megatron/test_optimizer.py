"""Learning rates of the recipe, clipping, and updates that are skipped."""

import pytest
import torch
from torch import Tensor

from nemo_opdlm.megatron.optimizer import StudentOptimizer, wrap
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.testing import tiny

#: 483 rollout steps of 16 updates, warm-up over the first 5 of them.
RECIPE = tiny.optimizer_settings(lr=1e-5, min_lr=1e-6, warmup_steps=80, decay_steps=483 * 16 + 1)
RATES = {0: 0, 40: 5e-6, 80: 1e-5, 500: 9.933e-6, 1932: 8.760e-6, 3864: 5.575e-6, 5796: 2.345e-6, 7728: 1e-6}


def make_optimizer(dtype: torch.dtype = torch.float32, **changes: object) -> StudentOptimizer:
    parallel = initialize()
    settings = tiny.optimizer_settings(**changes)
    network = tiny.random_network(tiny.architecture(), parallel, options=ModelOptions(params_dtype=dtype))
    return StudentOptimizer(wrap(network, settings), settings)


def fill_gradients(optimizer: StudentOptimizer, scale: float = 1.0) -> float:
    """Random gradients in DDP's buffers; returns their global norm."""
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(0)
    total = 0.0
    for parameter in optimizer.network.model.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        total += float(parameter.main_grad.double().pow(2).sum())
    return total**0.5


def snapshot(optimizer: StudentOptimizer) -> list[Tensor]:
    """Weights, master weights and moments."""
    network = optimizer.network.model
    tensors = [*network.parameters(), *(getattr(p, "main_param", p) for p in network.parameters())]
    for part in optimizer.megatron.chained_optimizers:
        tensors += [value for state in part.optimizer.state.values() for value in state.values()]
    return [tensor.detach().clone() for tensor in tensors if isinstance(tensor, Tensor)]


def test_the_learning_rate_of_every_update_is_the_recipes() -> None:
    optimizer = make_optimizer()
    optimizer = StudentOptimizer(optimizer.network, RECIPE)
    found = {}
    for update in range(7729):
        if update in RATES:
            found[update] = optimizer.lr
        optimizer.scheduler.step(1)
    assert found == pytest.approx(RATES, abs=5e-10)


def test_the_rate_an_update_uses_is_the_one_before_the_schedule_advances() -> None:
    optimizer = make_optimizer(eps=1e-30, decay_steps=1000)
    before = optimizer.network.model.head_weight().detach().clone()
    fill_gradients(optimizer)
    rate = optimizer.lr
    optimizer.step()
    # Adam's first step is lr * sign(gradient) wherever the gradient is not tiny.
    moved = (optimizer.network.model.head_weight() - before).abs()
    torch.testing.assert_close(moved, torch.full_like(moved, rate), rtol=1e-3, atol=1e-7)
    assert optimizer.lr < rate


def test_the_norm_is_reported_before_clipping_and_clipping_keeps_the_direction() -> None:
    clipped, free = make_optimizer(clip_grad=0.5), make_optimizer(clip_grad=0.0)
    for optimizer in (clipped, free):
        norm = fill_gradients(optimizer)
        assert optimizer.step() == pytest.approx(norm, rel=1e-5)
    for ours, theirs in zip(clipped.network.model.parameters(), free.network.model.parameters(), strict=True):
        torch.testing.assert_close(ours.main_grad, theirs.main_grad * 0.5 / norm, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_gradient_that_is_not_finite_leaves_weights_and_moments_untouched(dtype: torch.dtype, value: float) -> None:
    optimizer = make_optimizer(dtype)
    fill_gradients(optimizer)
    optimizer.step()
    before, rate = snapshot(optimizer), optimizer.lr
    fill_gradients(optimizer)
    next(optimizer.network.model.parameters()).main_grad[3, 5] = value
    norm = optimizer.step()
    assert StudentOptimizer.is_skipped(norm)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(snapshot(optimizer), before, strict=True))
    assert optimizer.lr < rate
    # The next good gradient is followed again.
    fill_gradients(optimizer)
    assert not StudentOptimizer.is_skipped(optimizer.step())
    assert not torch.equal(snapshot(optimizer)[0], before[0])


def test_an_update_without_any_supervised_token_is_skipped_although_moments_would_still_move_the_weights() -> None:
    optimizer = make_optimizer()
    fill_gradients(optimizer)
    optimizer.step()
    before = snapshot(optimizer)
    optimizer.zero_grad()
    assert optimizer.step() == 0
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(snapshot(optimizer), before, strict=True))
