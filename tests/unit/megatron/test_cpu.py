"""Megatron runs unmodified on a CPU, and it is the redirect that makes it run."""

import re
from collections.abc import Iterator
from pathlib import Path

import megatron.core
import pytest
import torch

from nemo_opdlm.diffusion.masks import AttentionRule, TokenAttributes
from nemo_opdlm.megatron import cpu
from nemo_opdlm.megatron.forward import MicroBatch, forward_backward
from nemo_opdlm.megatron.optimizer import StudentOptimizer, wrap
from nemo_opdlm.megatron.parallel import ParallelContext, initialize
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.testing import tiny

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is redirected")
SETTINGS = tiny.optimizer_settings()


@pytest.fixture(scope="module")
def parallel() -> ParallelContext:
    """The layout of one process."""
    return initialize()


@pytest.fixture
def without_redirect(parallel: ParallelContext) -> Iterator[None]:
    """The redirect is gone for one test."""
    cpu.remove_redirect()
    yield
    cpu.run_megatron_on_cpu()


@pytest.fixture(scope="module")
def optimizer(parallel: ParallelContext) -> StudentOptimizer:
    """A student ready to be trained."""
    return StudentOptimizer(wrap(tiny.random_network(tiny.architecture(), parallel), SETTINGS), SETTINGS)


def train(optimizer: StudentOptimizer) -> float:
    token_ids = torch.arange(8)[None]
    positions, zeros = torch.arange(8)[None], torch.zeros(1, 8, dtype=torch.int64)
    batch = MicroBatch(token_ids, TokenAttributes(zeros, zeros, positions, positions // 4))
    optimizer.zero_grad()
    forward_backward(
        optimizer.network, [batch], lambda hidden, _: (hidden.square().sum(), torch.tensor(8, dtype=torch.int), {})
    )
    return optimizer.step()


def test_megatron_trains_on_a_cpu_with_the_redirect(optimizer: StudentOptimizer) -> None:
    assert optimizer.network.model.attention.rule is AttentionRule.BLOCK_DIFFUSION
    assert train(optimizer) > 0


def test_without_the_redirect_megatron_asks_for_cuda_and_fails(
    optimizer: StudentOptimizer, without_redirect: None
) -> None:
    with pytest.raises((AssertionError, RuntimeError), match=r"(?i)cuda|nvidia"):
        train(optimizer)


def test_without_the_redirect_megatrons_optimizer_refuses_weights_on_a_cpu(
    parallel: ParallelContext, without_redirect: None
) -> None:
    options = ModelOptions(params_dtype=torch.bfloat16)
    network = tiny.random_network(tiny.architecture(), parallel, options=options)
    with pytest.raises((TypeError, AssertionError, RuntimeError), match=r"(?i)cuda|nvidia"):
        StudentOptimizer(wrap(network, SETTINGS), SETTINGS)


def test_a_request_for_cuda_is_answered_with_the_cpu(parallel: ParallelContext) -> None:
    for device in ("cuda", "cuda:0", torch.device("cuda", 0), 0):
        assert torch.zeros(1, device=device).device == torch.device("cpu")
    assert torch.ones(1).cuda().device == torch.device("cpu")
    assert torch.zeros(1, device="meta").device == torch.device("meta")


def test_the_versions_it_was_checked_with_are_those_the_package_asks_for() -> None:
    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    found = re.search(r'"megatron-core>=([\d.]+),<([\d.]+)"', text)
    assert found is not None and found.groups() == tuple(map(str, cpu.TESTED))


def test_another_version_of_megatron_is_refused_by_number(
    without_redirect: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(megatron.core, "__version__", "0.21.0")
    with pytest.raises(RuntimeError, match=r"0\.21\.0 on CPU is untested: install megatron-core>=0\.16\.1,<0\.20"):
        cpu.run_megatron_on_cpu()
    monkeypatch.undo()
