"""A distributed optimizer is saved and loaded: the next update is bitwise that of the run that went on."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from nemo_opdlm.megatron.checkpoint import load_sharded, save_sharded
from nemo_opdlm.megatron.optimizer import StudentOptimizer, wrap
from nemo_opdlm.megatron.parallel import ParallelContext
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.testing import tiny

SETTINGS = tiny.optimizer_settings(distributed=True, weight_decay=0.1)
PREFIX = "model."


def make_optimizer(parallel: ParallelContext, dtype: torch.dtype, seed: int) -> StudentOptimizer:
    network = tiny.random_network(tiny.architecture(), parallel, options=ModelOptions(params_dtype=dtype), seed=seed)
    wrapped = wrap(network, SETTINGS)
    assert wrapped.ddp[0].ddp_config.use_distributed_optimizer
    return StudentOptimizer(wrapped, SETTINGS)


def take_step(optimizer: StudentOptimizer, number: int) -> float:
    """An update by random gradients: backward passes on a GPU may add in another order every time."""
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(number)
    for parameter in optimizer.network.model.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))  # type: ignore[attr-defined]
    return optimizer.step()


def sharded(optimizer: StudentOptimizer, is_loading: bool) -> dict[str, object]:
    weights = optimizer.network.model.sharded_weights(PREFIX)
    return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading)}


def weights(optimizer: StudentOptimizer) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in optimizer.network.model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_optimizer_goes_on_as_the_one_that_was_saved(
    dtype: torch.dtype, parallel: ParallelContext, tmp_path: Path
) -> None:
    saved = make_optimizer(parallel, dtype, seed=0)
    for number in range(3):
        take_step(saved, number)
    save_sharded(tmp_path / "checkpoint", sharded(saved, is_loading=False))
    loaded = make_optimizer(parallel, dtype, seed=1)
    state = load_sharded(tmp_path / "checkpoint", sharded(loaded, is_loading=True), vocab_size=tiny.VOCAB_SIZE)
    loaded.network.model.load_weights(state["model"], PREFIX)
    loaded.load_state_dict(state["optimizer"])
    loaded.scheduler.load_state_dict(saved.scheduler.state_dict())
    for number in range(3, 6):
        assert take_step(saved, number) == take_step(loaded, number)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(weights(loaded), weights(saved), strict=True))
