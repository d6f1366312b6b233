"""The CPU's norm and gated MLP are torch's and Megatron's: values, gradients, and less memory."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor

from nemo_opdlm.megatron import lean_layers
from nemo_opdlm.megatron.lean_layers import gated_linear, linear_of_few_rows, rms_norm
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.memory import AllocationProfile

#: Of results in fp32, and of results that are rounded to bf16.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}

dtypes = pytest.mark.parametrize("dtype", list(TOLERANCE))


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradients(out: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out, leaves, random(*out.shape, dtype=out.dtype, seed=9)))


def assert_close(found: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()


@dtypes
@pytest.mark.parametrize("shape", [(5, 2, 24), (3, 24), (2, 3, 2, 24)])
def test_the_norm_is_torchs(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = random(*shape, dtype=dtype).requires_grad_(), random(24, dtype=dtype, seed=1).requires_grad_()
    ours, theirs = rms_norm(x, weight, 1e-5), F.rms_norm(x, (24,), weight, 1e-5)
    assert_close([ours, *gradients(ours, x, weight)], [theirs, *gradients(theirs, x, weight)], dtype)


@dtypes
@pytest.mark.parametrize("chunk_elements", [1, 40, 2**20])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_gate_is_that_of_the_formula(
    frozen: bool, chunk_elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lean_layers, "GATE_ELEMENTS", chunk_elements)
    x, weight = random(7, 2, 40, dtype=dtype).requires_grad_(), random(12, 20, dtype=dtype, seed=1)
    leaves = [x] if frozen else [x, weight.requires_grad_()]
    gate, up = x.chunk(2, -1)
    expected = F.linear(F.silu(gate) * up, weight)
    expected = [expected, *gradients(expected, *leaves)]
    # The input is what a layer hands over: its own gradient may be anywhere, its values are gone.
    out = gated_linear(x * 1, weight)
    assert_close([out, *gradients(out, *leaves)], expected, dtype)


def test_the_gradient_takes_the_place_of_the_input_once() -> None:
    x, weight = random(7, 40).requires_grad_(), random(12, 20, seed=1)
    handed_over = x * 1
    out = gated_linear(handed_over, weight)
    handed_over.retain_grad()
    out.sum().backward(retain_graph=True)
    assert handed_over.grad is not None and torch.equal(handed_over.grad, handed_over)
    with pytest.raises(AssertionError, match="handed over before"):
        out.sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_mlp_is_megatrons(bias: bool, autocast: bool) -> None:
    networks = [tiny.random_network(tiny.architecture(bias=bias, qkv_bias=bias), initialize()) for _ in range(2)]
    ours, theirs = (network[0].decoder.layers[0].mlp for network in networks)
    theirs.linear_fc2.__class__ = RowParallelLinear
    theirs.config = replace(theirs.config, use_te_activation_func=False)
    found = []
    for mlp in (ours, theirs):
        if bias:
            with torch.no_grad():
                mlp.linear_fc1.bias.copy_(random(*mlp.linear_fc1.bias.shape, seed=3))
        hidden = random(6, 1, mlp.linear_fc1.weight.shape[1]).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out, out_bias = mlp(hidden)
            found.append([out, *gradients(out, hidden, mlp.linear_fc1.weight, mlp.linear_fc2.weight)])
        assert (out_bias is None) == (not bias)
    assert_close(*found, torch.bfloat16 if autocast else torch.float32)


@dtypes
@pytest.mark.parametrize("num_rows", [0, 1, 4, 15, 16, 31, 32, 100])
@pytest.mark.parametrize("is_turned", [False, True])
def test_few_rows_give_what_a_linear_layer_gives(is_turned: bool, num_rows: int, dtype: torch.dtype) -> None:
    x, weight = random(num_rows, 24, dtype=dtype), random(40, 24, dtype=dtype, seed=1)
    out = linear_of_few_rows(x.T.contiguous().T if is_turned else x, weight)
    torch.testing.assert_close(out, F.linear(x, weight), atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-2)


def test_a_gate_keeps_its_input_and_nothing_as_wide() -> None:
    width, num_rows = 2048, 4096
    weight = random(8, width).requires_grad_()
    x = random(num_rows, 2 * width).requires_grad_()
    with AllocationProfile() as profile:
        out = gated_linear(x * 1, weight)
        out.sum().backward()
    wide = 4 * num_rows * width
    # The input, which its gradient replaces, and the gradient of what it was made of.
    assert profile.peak_bytes < 4.2 * wide
    assert (num_rows, width) not in profile.shapes
