"""A teacher whose weights wait in host memory gives the targets of one whose weights stay, in its own precision."""

import pytest
import torch

from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.distillation.divergence import DivergenceSpec, FullTarget
from nemo_opdlm.megatron.offload import HostWeights
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.trajectories import random_trajectory


def make_teacher(options: ModelOptions = ModelOptions(), tied: bool = True) -> Teacher:  # noqa: B008 (frozen)
    parallel = initialize()
    arch = tiny.architecture(share_embeddings_and_output_weights=tied)
    teacher = Teacher(arch, parallel, options, micro_batch_size=2)
    source = tiny.random_network(arch, parallel, AttentionRule.CAUSAL)
    teacher.network.load_state_dict(source.state_dict())
    return teacher


def logits(teacher: Teacher, trajectory: Trajectory) -> torch.Tensor:
    targets = teacher.targets(trajectory, DivergenceSpec())
    target = targets.at(torch.arange(int(trajectory.response_len.sum())))
    assert isinstance(target, FullTarget)
    return target.logits


@pytest.fixture
def trajectory() -> Trajectory:
    return random_trajectory(num_rows=6, block_size=4)


@pytest.mark.parametrize("tied", [True, False])
def test_offloading_changes_no_target_and_leaves_only_the_head(tied: bool, trajectory: Trajectory) -> None:
    teacher = make_teacher(tied=tied)
    network, expected = teacher.network, logits(teacher, trajectory)
    before = {name: weight.data_ptr() for name, weight in network.named_parameters()}
    network.offload()
    waiting = {name: weight.data_ptr() for name, weight in network.named_parameters()}
    stayed = [name for name in before if before[name] == waiting[name]]
    assert stayed == ["0.embedding.word_embeddings.weight" if tied else "0.output_layer.weight"]
    with network.on_device(), network.on_device():
        inside = {name: weight.data_ptr() for name, weight in network.named_parameters()}
        assert all(inside[name] != waiting[name] for name in before if name not in stayed)
    for _ in range(2):
        assert torch.equal(logits(teacher, trajectory), expected)
        assert {name: weight.data_ptr() for name, weight in network.named_parameters()} == waiting


def test_weights_wait_on_the_host_after_a_failure_too() -> None:
    weight = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    weights = HostWeights([weight])
    waiting = weight.data_ptr()
    with pytest.raises(RuntimeError), weights.on_device():
        raise RuntimeError
    assert weight.data_ptr() == waiting and torch.equal(weight, torch.ones(3))


def test_the_students_autocast_leaves_the_teachers_precision_alone(trajectory: Trajectory) -> None:
    exact = make_teacher()
    targets, tokens = exact.targets(trajectory, DivergenceSpec()), torch.arange(int(trajectory.response_len.sum()))
    expected = targets.at(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = targets.at(tokens)
    assert isinstance(found, FullTarget) and isinstance(expected, FullTarget)
    assert torch.equal(found.logits, expected.logits)
    rounded = logits(make_teacher(ModelOptions(params_dtype=torch.bfloat16)), trajectory)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, expected.logits)
    torch.testing.assert_close(rounded, expected.logits, atol=0.2, rtol=0.1)
