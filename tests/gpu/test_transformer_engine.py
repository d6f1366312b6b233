"""Transformer Engine's layers compute what Megatron's do, and FP8 stays near them; each recipe where the GPU knows it."""

import copy
from pathlib import Path

import pytest
import torch

from nemo_opdlm.config.precision import FP8_RECIPES
from nemo_opdlm.diffusion.state_selection import StateSelection, select_states
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.distillation.divergence import DivergenceSpec
from nemo_opdlm.distillation.loss import Normalization
from nemo_opdlm.megatron.checkpoint import load_sharded, save_sharded
from nemo_opdlm.megatron.forward import RowSplit, forward_backward
from nemo_opdlm.megatron.optimizer import StudentOptimizer, wrap
from nemo_opdlm.megatron.parallel import ParallelContext
from nemo_opdlm.megatron.step import distillation_loss, micro_batches, total
from nemo_opdlm.megatron.student import ModelOptions, StagedGPT
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.testing import tiny
from tests.gpu import both_devices

pytest.importorskip("transformer_engine.pytorch", reason="Transformer Engine is not installed")

PREFIX = "model."
#: Every width a multiple of 128, as the strictest recipe wants it.
SHAPE = tiny.architecture(hidden_size=128, ffn_hidden_size=256, kv_channels=64)
PLAIN = ModelOptions(params_dtype=torch.bfloat16)
#: Loss and gradient norm of an update in FP8 beside bf16.
BAND = 0.1


def options(recipe: str | None) -> ModelOptions:
    fp8 = (
        {}
        if recipe is None
        else {
            "fp8": "e4m3" if recipe == "mxfp8" else "hybrid",
            "fp8_recipe": recipe,
            "fp8_amax_history_len": 16,
            "fp8_amax_compute_algo": "max",
        }
    )
    return ModelOptions(
        params_dtype=torch.bfloat16,
        transformer_engine=True,
        token_multiple=1 if recipe is None else FP8_RECIPES[recipe].multiple,
        transformer_config=fp8,
    )


def network(parallel: ParallelContext, how: ModelOptions) -> StagedGPT:
    return tiny.random_network(SHAPE, parallel, options=how)


def with_weights_of(source: StagedGPT, target: StagedGPT, folder: Path) -> StagedGPT:
    """Through a checkpoint, as archives are read: both kinds of layers name their weights alike there."""
    save_sharded(folder, {"model": source.sharded_weights(PREFIX)})
    state = load_sharded(folder, {"model": target.sharded_weights(PREFIX)}, vocab_size=tiny.VOCAB_SIZE)
    target.load_weights(state["model"], PREFIX)
    return target


def update(parallel: ParallelContext, student: StagedGPT, trajectory: Trajectory) -> tuple[float, float]:
    """Loss and gradient norm on given rollouts."""
    adam = tiny.optimizer_settings()
    wrapped = wrap(student, adam)
    optimizer = StudentOptimizer(wrapped, adam)
    torch.manual_seed(both_devices.SEED)
    teacher, spec = Teacher(SHAPE, parallel, PLAIN, micro_batch_size=4), DivergenceSpec()
    states = select_states(
        StateSelection.ONE_STATE_PER_BLOCK, trajectory, tiny.MASK_TOKEN_ID, seed=both_devices.SEED, step=1
    )
    rows = torch.arange(len(trajectory), device=parallel.device)
    split = RowSplit.over_context(student)
    targets = teacher.targets(trajectory, spec)
    parts = micro_batches(trajectory, states, targets, rows, Normalization.sequence, 4, split)
    optimizer.zero_grad()
    sums = total(forward_backward(wrapped, parts, distillation_loss(wrapped.head, spec)), parallel)
    return sums["loss_sum"] / sums["count"], optimizer.step()


@pytest.mark.parametrize("recipe", [None, *FP8_RECIPES])
def test_an_update_is_near_that_of_megatrons_layers_in_bf16(
    recipe: str | None, parallel: ParallelContext, tmp_path: Path
) -> None:
    if recipe is not None and torch.cuda.get_device_capability() < FP8_RECIPES[recipe].capability:
        pytest.skip(f"this GPU does not know the recipe {recipe}")
    plain = network(parallel, PLAIN)
    trajectory = both_devices.respond(plain, runs_ahead=True)
    ours = with_weights_of(plain, network(parallel, options(recipe)), tmp_path / "checkpoint")
    loss, grad_norm = update(parallel, ours, copy.deepcopy(trajectory))
    expected_loss, expected_norm = update(parallel, plain, trajectory)
    assert loss == pytest.approx(expected_loss, rel=0.02 if recipe is None else BAND)
    assert grad_norm == pytest.approx(expected_norm, rel=0.05 if recipe is None else 2 * BAND)


@pytest.mark.parametrize("recipe", [None, "delayed", "tensorwise"])
def test_rollouts_run_on_transformer_engines_layers(recipe: str | None, parallel: ParallelContext) -> None:
    trajectory = both_devices.respond(network(parallel, options(recipe)), runs_ahead=True)
    assert bool((trajectory.response_len == 32).all()) and bool((trajectory.confidence >= 0).all())
