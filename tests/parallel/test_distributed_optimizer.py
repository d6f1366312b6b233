"""Ranks that share out the optimizer's state save it together; as many or fewer of them go on where it was saved.

On a CPU a run takes the plain optimizer (`optimizer.wrap`). Here the distributed one is made all the same.
"""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_opdlm.diffusion.masks import TokenAttributes
from nemo_opdlm.megatron import optimizer as megatron_optimizer
from nemo_opdlm.megatron import parallel
from nemo_opdlm.megatron.checkpoint import load_sharded, save_sharded
from nemo_opdlm.megatron.forward import MicroBatch, forward_only
from nemo_opdlm.megatron.optimizer import StudentOptimizer, wrap
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.ranks import Ranks
from tests.parallel import runs
from tests.parallel.runs import Layout, Outcome
from tests.parallel.test_layouts import assert_same_losses, assert_same_rollouts

PREFIX = "model."


def make_optimizer(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, seed: int, tied: bool = True, **changes: Any
) -> StudentOptimizer:
    settings = tiny.optimizer_settings(distributed=True, weight_decay=0.1, **changes)
    parallel.destroy()
    options = ModelOptions(params_dtype=dtype)
    arch = tiny.architecture(share_embeddings_and_output_weights=tied)
    network = tiny.random_network(arch, parallel.initialize(), options=options, seed=seed)
    monkeypatch.setattr(megatron_optimizer, "wants_cpu", lambda: False)
    return StudentOptimizer(wrap(network, settings), settings)


def update(optimizer: StudentOptimizer, number: int) -> list[Tensor]:
    """Follow random gradients, the same on every rank, and return the new weights."""
    optimizer.zero_grad()
    generator = torch.Generator().manual_seed(number)
    for parameter in optimizer.network.model.parameters():
        parameter.main_grad.copy_(torch.randn(parameter.shape, generator=generator))  # type: ignore[attr-defined]
    optimizer.step()
    return [parameter.detach().clone() for parameter in optimizer.network.model.parameters()]


def sharded(optimizer: StudentOptimizer, is_loading: bool) -> dict[str, Any]:
    weights = optimizer.network.model.sharded_weights(PREFIX)
    return {"model": weights, "optimizer": optimizer.sharded_state_dict(weights, is_loading)}


def train_and_save(folder: str, dtype: torch.dtype) -> tuple[int, list[list[Tensor]], dict[str, Any]]:
    """Numbers in this rank's moments, the weights after each update that follows the save, the schedule when saved."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        optimizer = make_optimizer(monkeypatch, dtype, seed=0)
        for number in range(3):
            update(optimizer, number)
        save_sharded(folder, sharded(optimizer, is_loading=False))
        schedule = optimizer.scheduler.state_dict()
        states = optimizer.megatron.chained_optimizers[0].optimizer.state.values()
        return sum(state["exp_avg"].numel() for state in states), [update(optimizer, n) for n in range(3, 5)], schedule


def load_and_train(folder: str, dtype: torch.dtype, schedule: dict[str, Any]) -> list[list[Tensor]]:
    """The weights after each update that follows the loading."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        optimizer = make_optimizer(monkeypatch, dtype, seed=1)
        state = load_sharded(Path(folder), sharded(optimizer, is_loading=True), vocab_size=tiny.VOCAB_SIZE)
        optimizer.network.model.load_weights(state["model"], PREFIX)
        optimizer.load_state_dict(state["optimizer"])
        optimizer.scheduler.load_state_dict(schedule)
        return [update(optimizer, number) for number in range(3, 5)]


def logits_after_an_update(overlap: bool, use_head: bool) -> tuple[bool, list[Tensor], Tensor | None]:
    """Whether the update itself gathered all weights, the gathered weights, and what a forward pass made of them.

    In buckets of 1000 weights the head is in another one than the layers.
    """
    with pytest.MonkeyPatch.context() as monkeypatch:
        config_type = partial(megatron_optimizer.DistributedDataParallelConfig, bucket_size=1000)
        monkeypatch.setattr(megatron_optimizer, "DistributedDataParallelConfig", config_type)
        overlaps = {"overlap_grad_sync": overlap, "overlap_param_sync": overlap}
        optimizer = make_optimizer(monkeypatch, torch.float32, seed=0, tied=False, **overlaps)
        model, head = optimizer.network.model, optimizer.network.head
        at_once, logits = update(optimizer, 0), None
        if use_head:
            tokens = torch.arange(8)[None]
            attributes = TokenAttributes(torch.zeros_like(tokens), torch.zeros_like(tokens), tokens, tokens // 4)

            def read(hidden: Tensor, _: MicroBatch) -> Tensor:
                groups = [group for chunk in optimizer.network.ddp for group in chunk.bucket_groups]
                assert all(group.param_gather_handle is None for group in groups)
                return head.logits(hidden)

            (logits,) = forward_only(model, [MicroBatch(tokens, attributes)], read)
        optimizer.network.finish_param_sync()
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        return all(torch.equal(x, y) for x, y in zip(at_once, weights, strict=True)), weights, logits


@pytest.mark.parametrize("use_head", [True, False])
def test_weights_are_gathered_late_but_before_they_are_read(use_head: bool, two_ranks: Ranks) -> None:
    plain = two_ranks.run(logits_after_an_update, False, use_head)
    overlapped = two_ranks.run(logits_after_an_update, True, use_head)
    assert all(at_once for at_once, *_ in plain) and not any(at_once for at_once, *_ in overlapped)
    expected, logits = plain[0][1:]
    # The ranks' shares of the gradient norm, which clips, are others in many buckets.
    for _, weights, found in overlapped:
        torch.testing.assert_close((weights, found), (expected, logits), atol=1e-5, rtol=0)


def train_overlapped(archive: str) -> Outcome:
    """Three updates, the third after another rollout, with both overlaps."""
    overlaps = ("model.optim.overlap_grad_sync=true", "model.optim.overlap_param_sync=true")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(megatron_optimizer, "wants_cpu", lambda: False)
        return runs.train(archive, Layout(), 3, ("model.optim.name=distributed_fused_adam", *overlaps))


def test_overlapped_communication_changes_no_update(glassllm: str, two_ranks: Ranks) -> None:
    expected = runs.train(glassllm, Layout(), 3)
    for found in two_ranks.run(train_overlapped, glassllm):
        assert_same_rollouts(found, expected)
        assert_same_losses(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_after_loading_are_those_of_the_ranks_that_went_on(
    dtype: torch.dtype, two_ranks: Ranks, tmp_path: Path
) -> None:
    folder = str(tmp_path / "checkpoint")
    (first, expected, schedule), (second, *_) = two_ranks.run(train_and_save, folder, dtype)
    num_weights = sum(weight.numel() for weight in expected[0])
    assert first + second == num_weights and 0.4 < first / num_weights < 0.6
    # As many ranks do the same sums. One rank adds up the gradient norm, which clips, in another order.
    for found in two_ranks.run(load_and_train, folder, dtype, schedule):
        assert all(torch.equal(x, y) for x, y in zip(sum(found, []), sum(expected, []), strict=True))
    alone = load_and_train(folder, dtype, schedule)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    for ours, theirs in zip(sum(alone, []), sum(expected, []), strict=True):
        torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)
