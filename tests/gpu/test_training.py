"""Training over NCCL: the losses of a CPU in fp32, finite ones in bf16 with fp32 master weights."""

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.megatron import cpu
from nemo_opdlm.megatron.parallel import ParallelContext
from tests.gpu import both_devices

UPDATES = len(both_devices.ROLLOUT_STEPS) * 2


def rollouts(on_cpu: dict[str, Any], parallel: ParallelContext) -> list[Trajectory]:
    return [Trajectory.from_state_dict(state).to(parallel.device) for state in on_cpu["rollouts"]]


@pytest.fixture
def full_precision() -> Iterator[None]:
    """TF32 keeps 10 bits of a factor: no comparison to 1e-4 could hold."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def test_groups_are_those_of_nccl_and_nothing_is_redirected(parallel: ParallelContext) -> None:
    assert parallel.device.type == "cuda" and dist.get_backend(parallel.groups.tp) == "nccl"
    assert torch.zeros(1, device="cuda").is_cuda and not cpu.wants_cpu()


def test_random_weights_are_those_of_the_cpu(parallel: ParallelContext, on_cpu: dict[str, Any]) -> None:
    for ours, theirs in zip(both_devices.student(parallel).parameters(), on_cpu["weights"], strict=True):
        assert ours.is_cuda and torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("distributed", [False, True])
def test_losses_in_fp32_are_those_of_the_cpu_on_the_same_rollouts(
    distributed: bool, parallel: ParallelContext, on_cpu: dict[str, Any], full_precision: None
) -> None:
    replayed = rollouts(on_cpu, parallel)
    _, updates, _ = both_devices.train(parallel, distributed=distributed, replayed=replayed)
    assert len(updates) == len(on_cpu["updates"]) == UPDATES
    for ours, theirs in zip(updates, on_cpu["updates"], strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("distributed", [False, True])
def test_bf16_trains_on_its_own_rollouts_with_fp32_master_weights(distributed: bool, parallel: ParallelContext) -> None:
    network, updates, _ = both_devices.train(parallel, torch.bfloat16, distributed)
    assert len(updates) == UPDATES
    for update in updates:
        assert math.isfinite(update["loss"]) and 0 < update["grad_norm"] < math.inf
    for parameter in network.model.parameters():
        assert parameter.dtype == torch.bfloat16 and parameter.isfinite().all()
        assert parameter.main_param.dtype == torch.float32  # type: ignore[attr-defined]


def test_the_first_loss_in_bf16_is_near_that_in_fp32(parallel: ParallelContext, on_cpu: dict[str, Any]) -> None:
    _, updates, _ = both_devices.train(parallel, torch.bfloat16, replayed=rollouts(on_cpu, parallel))
    assert updates[0]["loss"] == pytest.approx(on_cpu["updates"][0]["loss"], rel=0.05)
