"""Stateless randomness: every random number is a function of its key, never of what was drawn before it.

The numbers of a sample therefore do not depend on the device, the batch, the rank or the order in which samples are
processed, and a resumed run draws what the uninterrupted run would have drawn.
"""

import enum

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
# SplitMix64's finaliser (Steele, Lea and Flood, 2014): shift right, xor, multiply.
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
_WORD = (1 << 64) - 1
# A float32 holds 24 bits: more could round up to 1.
_NUM_BITS = 24


class Stream(enum.IntEnum):
    """What a random number is for; streams never share numbers."""

    PROPOSAL = 1
    REMASKING = 2
    STATE = 3
    NOISE = 4
    SHUFFLE = 5
    EVALUATION = 6


def uniform(
    seed: int,
    stream: Stream,
    step: int,
    sample_ids: Tensor,
    position: Tensor | int,
    forward: Tensor | int = 0,
) -> Tensor:
    """Uniform numbers in [0, 1), one for each key.

    Args:
        seed: the run's seed, any integer.
        stream: purpose of the number.
        step: rollout step.
        sample_ids: int64, global sample numbers.
        position: absolute token position.
        forward: number of the denoising forward, or any further counter.

    Returns:
        float32 of the shape that ``sample_ids``, ``position`` and ``forward`` broadcast to; a multiple of 2**-24.
    """
    key = _absorb(_absorb_scalars(seed, stream, step), sample_ids)
    bits = _absorb(_absorb(key, position), forward)
    return _shift_right(bits, 64 - _NUM_BITS).to(torch.float32) * 2.0**-_NUM_BITS


def permutation(seed: int, stream: Stream, epoch: int, n: int) -> Tensor:
    """Random order of ``0 .. n - 1``, int64 ``[n]`` on the CPU; another one for each (seed, stream, epoch)."""
    keys = _absorb(_absorb_scalars(seed, stream, epoch), torch.arange(n))
    return keys.argsort(stable=True)


def _absorb_scalars(*words: int) -> int:
    key = 0
    for word in words:
        key = _mix_scalar(((key + _GOLDEN) & _WORD) ^ (word & _WORD))
    return key


def _absorb(key: Tensor | int, word: Tensor | int) -> Tensor:
    """Hash ``word`` into ``key``; a bijection in each of them, so keys that differ in one part never collide."""
    offset = _signed(key + _GOLDEN) if isinstance(key, int) else key + _signed(_GOLDEN)
    state = offset ^ (_signed(word) if isinstance(word, int) else word)
    assert isinstance(state, Tensor) and state.dtype == torch.int64, "keys are int64 tensors"
    for shift, factor in _ROUNDS:
        state = (state ^ _shift_right(state, shift)) * _signed(factor)
    return state ^ _shift_right(state, _LAST_SHIFT)


def _mix_scalar(state: int) -> int:
    for shift, factor in _ROUNDS:
        state = ((state ^ (state >> shift)) * factor) & _WORD
    return state ^ (state >> _LAST_SHIFT)


def _shift_right(state: Tensor, shift: int) -> Tensor:
    # int64 shifts copy the sign bit; the mask makes the shift logical.
    return (state >> shift) & ((1 << (64 - shift)) - 1)


def _signed(word: int) -> int:
    """The int64 with the bits of ``word`` modulo 2**64; tensor arithmetic wraps around, Python's does not."""
    word &= _WORD
    return word - (1 << 64) if word >> 63 else word
