"""Learning rates of the recipe, clipping, updates that are skipped, and what checkpoints keep of an optimizer."""

import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_opdlm.megatron import optimizer as megatron_optimizer
from nemo_opdlm.megatron.checkpoint import load_sharded, save_sharded
from nemo_opdlm.megatron.cpu import wants_cpu
from nemo_opdlm.megatron.optimizer import StudentOptimizer, wrap
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.testing import tiny

#: 483 rollout steps of 16 updates, warm-up over the first 5 of them.
RECIPE = tiny.optimizer_settings(lr=1e-5, min_lr=1e-6, warmup_steps=80, decay_steps=483 * 16 + 1)
RATES = {0: 0, 40: 5e-6, 80: 1e-5, 500: 9.933e-6, 1932: 8.760e-6, 3864: 5.575e-6, 5796: 2.345e-6, 7728: 1e-6}


def make_optimizer(dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> StudentOptimizer:
    parallel = initialize()
    settings = tiny.optimizer_settings(**changes)
    network = tiny.random_network(tiny.architecture(), parallel, options=ModelOptions(params_dtype=dtype), seed=seed)
    return StudentOptimizer(wrap(network, settings), settings)


def fill_gradients(optimizer: StudentOptimizer, scale: float = 1.0, seed: int = 0) -> float:
    """Random gradients in DDP's buffers; returns their global norm."""
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(seed)
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
        parameters = [parameter for group in part.optimizer.param_groups for parameter in group["params"]]
        states = [part.optimizer.state[parameter] for parameter in parameters]
        tensors += [state[name] for state in states for name in sorted(state)]
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


# -- checkpoints --


def sharded(optimizer: StudentOptimizer, is_loading: bool) -> dict[str, object]:
    weights = optimizer.network.model.sharded_weights("model.")
    return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("distributed", [False, True])
def test_a_loaded_optimizer_goes_on_as_the_one_that_was_saved(
    distributed: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The distributed optimizer itself runs on a CPU too, with torch's Adam: the one of a GPU without Transformer Engine.
    monkeypatch.setattr(megatron_optimizer, "wants_cpu", lambda: False)
    saved = make_optimizer(dtype, distributed=distributed, weight_decay=0.1)
    for update in range(3):
        fill_gradients(saved, seed=update)
        saved.step()
    save_sharded(tmp_path / "checkpoint", sharded(saved, is_loading=False))
    loaded = make_optimizer(dtype, seed=1, distributed=distributed, weight_decay=0.1)
    state = load_sharded(tmp_path / "checkpoint", sharded(loaded, is_loading=True), vocab_size=tiny.VOCAB_SIZE)
    loaded.network.model.load_weights(state["model"], "model.")
    loaded.load_state_dict(state["optimizer"])
    loaded.scheduler.load_state_dict(saved.scheduler.state_dict())
    for update in range(3, 6):
        norms = [fill_gradients(optimizer, seed=update) and optimizer.step() for optimizer in (saved, loaded)]
        assert norms[0] == norms[1] and saved.lr == loaded.lr
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(snapshot(loaded), snapshot(saved), strict=True))


@pytest.mark.skipif(not wants_cpu(), reason="there is a GPU, so a distributed optimizer is one")
def test_on_a_cpu_it_is_said_once_that_the_optimizer_is_not_distributed(caplog: pytest.LogCaptureFixture) -> None:
    def messages() -> list[str]:
        return [record.message for record in caplog.records if record.name == megatron_optimizer.__name__]

    with caplog.at_level(logging.INFO, logger=megatron_optimizer.__name__):
        make_optimizer()
        assert messages() == []
        make_optimizer(distributed=True)
    assert messages() == ["model.optim.name=distributed_fused_adam: no GPU, every rank keeps the whole optimizer state"]
