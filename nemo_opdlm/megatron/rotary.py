"""Rotary position embedding by explicit position ids, as Hugging Face's Llama and Qwen families define it.

Megatron's GPTModel numbers positions 0 .. S-1 whatever ``position_ids`` says; a two-stream row repeats positions, so both models
rotate inside the core attention instead.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

ROPE_TYPES = ("default", "linear", "llama3")


def inverse_frequencies(head_dim: int, base: float, scaling: Mapping[str, Any] | None = None) -> Tensor:
    """Angular speed of each rotated pair, fp32 ``[head_dim // 2]``.

    Args:
        head_dim: channels of one head, half of which are rotated against the other half.
        base: ``rotary_base`` (theta).
        scaling: Hugging Face's ``rope_scaling``: type ``default``, ``linear`` (factor) or ``llama3``.

    Raises:
        ValueError: an unknown scaling type.
    """
    inv_freq = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    kind = "default" if not scaling else str(scaling.get("rope_type", scaling.get("type", "default")))
    if kind == "default":
        return inv_freq
    if kind == "linear":
        return inv_freq.div(float(scaling["factor"]))  # type: ignore[index]
    if kind == "llama3":
        return _llama3(inv_freq, scaling)  # type: ignore[arg-type]
    raise ValueError(f"rope_scaling type '{kind}' is not supported: use one of {', '.join(ROPE_TYPES)}.")


def _llama3(inv_freq: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Llama 3.1's rule: slow frequencies are divided by the factor, fast ones kept, those between interpolated."""
    factor, context = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    wavelength = 2 * math.pi / inv_freq
    smooth = (context / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > context / low, inv_freq / factor, between)
    return torch.where(wavelength < context / high, inv_freq, scaled)


def cos_sin(inv_freq: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``position_ids [...]``: fp32 ``[..., head_dim]`` each, both halves alike."""
    angles = position_ids.to(torch.float32)[..., None] * inv_freq
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``x [..., heads, head_dim]`` by ``cos``/``sin [..., 1, head_dim]`` (half-split pairs), keeping its dtype."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x * cos + turned * sin).to(x.dtype)


def rotate_without_gradient(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same with fewer operators, whose results are overwritten."""
    exact, half = x.to(cos.dtype), x.shape[-1] // 2
    out = exact * cos
    out[..., :half].addcmul_(exact[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(exact[..., :half], sin[..., half:])
    return out.to(x.dtype)
