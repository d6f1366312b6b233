"""Norm and gated MLP on a CPU that keep for the backward pass what they cannot do without, and products of few rows.

Torch's norm and Megatron's gate come in pieces there, each of which autograd keeps the inputs of. On a GPU torch fuses the norm.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Elements of a gate that are alive at a time.
GATE_ELEMENTS = 2**20
#: Rows below which kernels for narrow matrices do better.
_FEW_ROWS = 16


def hand_over(gate_and_up: Tensor) -> Tensor:
    """In the place of an MLP's activation function, whose work its second linear layer does, a `GatedRowParallelLinear`."""
    return gate_and_up


class GatedRowParallelLinear(RowParallelLinear):
    """Megatron's layer for an input that is still to be gated; what it does between the ranks stays as it is."""

    def _forward_impl(self, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        return gated_linear(input, weight)


def gated_linear(gate_and_up: Tensor, weight: Tensor) -> Tensor:
    """``(silu(gate) * up) @ weight.T`` of ``[..., 2 F]`` and ``[H, F]``: ``[..., H]``.

    Nothing of size ``[..., F]`` is kept: the gate is computed again in the backward pass, a few rows at a time, and the gradient
    of the input takes its place. So nobody else may need the input then, as nobody needs the output of a linear layer; and
    the backward pass can run once.
    """
    kind = gate_and_up.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else gate_and_up.dtype
    with torch.autocast(kind, enabled=False):
        out: Tensor = _GatedLinear.apply(gate_and_up, weight, dtype)
    return out


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_and_up: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.input, ctx.weight, ctx.dtype = gate_and_up, weight, dtype
        matrix = weight.to(dtype)
        out = gate_and_up.new_empty(*gate_and_up.shape[:-1], weight.shape[0], dtype=dtype)
        for rows, part in _chunks(gate_and_up, out):
            gate, up = rows.chunk(2, -1)
            torch.mm(F.silu(gate).mul_(up).to(dtype), matrix.T, out=part)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        assert ctx.input is not None, "the gradient of a gate was handed over before"
        gate_and_up, ctx.input = ctx.input, None
        with torch.autocast(grad.device.type, enabled=False):
            matrix = ctx.weight.to(ctx.dtype)
            grad_weight = torch.zeros_like(ctx.weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            for rows, part in _chunks(gate_and_up, grad.contiguous()):
                _turn_into_gradient(rows, part, matrix, grad_weight)
        return gate_and_up, None if grad_weight is None else grad_weight.to(ctx.weight.dtype), None


def _turn_into_gradient(gate_and_up: Tensor, grad: Tensor, matrix: Tensor, grad_weight: Tensor | None) -> None:
    """Of some rows ``[N, 2 F]`` with the output's gradient ``[N, H]``; the weight's is added up in fp32."""
    gate, up = gate_and_up.chunk(2, -1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    if grad_weight is not None:
        product = (silu * up).to(matrix.dtype)
        if matrix.dtype == grad_weight.dtype:
            grad_weight.addmm_(grad.T, product)
        else:
            grad_weight.add_(grad.T @ product)
        del product
    grad_product = (grad @ matrix).to(gate.dtype)
    # silu' = sigmoid (1 - silu) + silu
    slope = sigmoid.addcmul_(sigmoid, silu, value=-1).add_(silu)
    gate.copy_(slope.mul_(up).mul_(grad_product))
    up.copy_(silu.mul_(grad_product))


def _chunks(gate_and_up: Tensor, other: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """A few rows of both at a time."""
    width = gate_and_up.shape[-1]
    rows, others = gate_and_up.view(-1, width), other.view(-1, other.shape[-1])
    num_rows = max(1, 2 * GATE_ELEMENTS // width)
    yield from zip(rows.split(num_rows), others.split(num_rows), strict=True)


def linear_of_few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` of ``[T, K]`` and ``[O, K]`` on a CPU, ``[T, O]`` with whichever dimension contiguous.

    As ``weight @ x.T`` it is faster by a tenth for some hundred rows of fp32, and by up to four times for four of them, whose
    elements stand side by side; of bf16 few rows are better multiplied the usual way.
    """
    few = _FEW_ROWS if x.dtype == torch.float32 else 2 * _FEW_ROWS
    if x.shape[0] >= few:
        return torch.mm(weight, x.T).T
    x = x.contiguous()
    return torch.mm(weight, x.T).T if x.dtype == torch.float32 else F.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x ** 2) + eps) * weight`` over the last dimension; keeps its input and a number for each row."""
    if not torch.is_grad_enabled():
        return _normed(x, weight, eps)[0]
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    exact = x.float()
    scale = exact.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (exact * scale).mul_(weight).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x.float() * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad_normed = grad.float() * weight
        along = (grad_normed * normed).mean(-1, keepdim=True)
        grad_x = grad_normed.sub_(normed.mul_(along)).mul_(scale)
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None
