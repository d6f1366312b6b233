"""Stateless random numbers: a fixed function of the key, uniform, and without memory between neighbouring keys."""

import itertools

import pytest
import torch
from torch import Tensor

from nemo_opdlm.rng import Stream, permutation, uniform

N = 1 << 16


def reference_uniform(seed: int, stream: int, step: int, sample: int, position: int, forward: int) -> float:
    """The definition in unbounded integers: SplitMix64's step for each word of the key, 24 bits of the result."""
    word_size = 1 << 64
    key = 0
    for word in (seed, stream, step, sample, position, forward):
        key = ((key + 0x9E3779B97F4A7C15) % word_size) ^ (word % word_size)
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) % word_size
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) % word_size
        key ^= key >> 31
    return (key >> 40) / (1 << 24)


def numbers(**changes: int | Tensor) -> Tensor:
    key = {"seed": 3, "stream": Stream.PROPOSAL, "step": 5, "sample_ids": torch.arange(N), "position": 11, "forward": 2}
    return uniform(**{**key, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [0, 1, -1, 10086, 2**31, 2**63 - 1, -(2**63), 2**64 - 1, 2**64 + 5])
def test_equals_the_definition_in_unbounded_integers(seed: int) -> None:
    samples = [0, 1, -1, 2**31, 2**63 - 1, -(2**63), 123456789]
    for stream, position, forward in itertools.product(Stream, (0, 7, 2**40), (0, 1)):
        actual = uniform(seed, stream, 4, torch.tensor(samples), position, forward)
        expected = [reference_uniform(seed, stream, 4, sample, position, forward) for sample in samples]
        assert actual.tolist() == expected


def test_golden_values() -> None:
    # Pinned: another function would change every rollout of every resumed run.
    samples = torch.tensor([0, 1, 2**40])
    assert (uniform(0, Stream.PROPOSAL, 0, samples, 0) * 2**24).tolist() == [588699, 2065965, 12188546]
    assert (uniform(10086, Stream.STATE, 7, samples, 3, 1) * 2**24).tolist() == [8276615, 4413251, 9437672]
    assert permutation(10086, Stream.SHUFFLE, 0, 8).tolist() == [1, 2, 5, 4, 7, 6, 0, 3]


def test_broadcasts_to_the_numbers_of_the_single_keys() -> None:
    samples, positions, forwards = torch.arange(3)[:, None, None], torch.arange(4)[:, None], torch.arange(5)
    together = uniform(1, Stream.STATE, 2, samples, positions, forwards)
    assert together.shape == (3, 4, 5) and together.dtype == torch.float32
    for s, p, f in itertools.product(range(3), range(4), range(5)):
        assert together[s, p, f] == uniform(1, Stream.STATE, 2, torch.tensor(s), p, f)


def test_lies_in_the_half_open_interval_and_has_24_bits() -> None:
    u = numbers()
    assert u.min() >= 0 and u.max() < 1
    assert torch.equal((u * 2**24).round() / 2**24, u)


def test_is_uniform() -> None:
    u = numbers()
    counts = torch.histc(u, 64, 0, 1)
    chi_square = ((counts - N / 64) ** 2 / (N / 64)).sum()
    assert chi_square < 63 + 5 * (2 * 63) ** 0.5
    assert abs(u.mean() - 0.5) < 5 / (12 * N) ** 0.5


@pytest.mark.parametrize(
    "neighbour",
    [
        {"seed": 4},
        {"stream": Stream.REMASKING},
        {"step": 6},
        {"sample_ids": torch.arange(1, N + 1)},
        {"position": 12},
        {"forward": 3},
        {"step": 11, "position": 5},
    ],
)
def test_neighbouring_keys_are_uncorrelated(neighbour: dict[str, int | Tensor]) -> None:
    u, v = numbers() - 0.5, numbers(**neighbour) - 0.5
    assert abs((u * v).mean() * 12) < 5 / N**0.5
    # The lowest bits too: correlations of the values only see the highest.
    low_u, low_v = ((x + 0.5) * 2**24 % 2 for x in (u, v))
    assert abs((low_u == low_v).float().mean() - 0.5) < 5 / (4 * N) ** 0.5


def test_counters_of_one_sample_are_uniform_and_serially_uncorrelated() -> None:
    for axis in ("position", "forward"):
        u = numbers(sample_ids=torch.tensor(9), **{axis: torch.arange(N)}) - 0.5
        assert abs(u.mean()) < 5 / (12 * N) ** 0.5
        assert abs((u[1:] * u[:-1]).mean() * 12) < 5 / N**0.5


def test_sample_position_and_forward_do_not_stand_in_for_each_other() -> None:
    grid = torch.arange(16)
    u = uniform(0, Stream.PROPOSAL, 0, grid[:, None, None], grid[:, None], grid)
    # 4096 draws of 24 bits: more than a few equal pairs would mean that keys are merged before they are hashed.
    assert u.unique().numel() > u.numel() - 5


@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000])
def test_permutations_are_permutations(n: int) -> None:
    order = permutation(3, Stream.SHUFFLE, 1, n)
    assert order.dtype == torch.int64 and order.sort().values.tolist() == list(range(n))


def test_permutations_differ_and_every_order_is_as_likely() -> None:
    assert not torch.equal(permutation(3, Stream.SHUFFLE, 0, 50), permutation(3, Stream.SHUFFLE, 1, 50))
    assert not torch.equal(permutation(3, Stream.SHUFFLE, 0, 50), permutation(4, Stream.SHUFFLE, 0, 50))
    counts = {order: 0 for order in itertools.permutations(range(4))}
    for epoch in range(4800):
        counts[tuple(permutation(0, Stream.SHUFFLE, epoch, 4).tolist())] += 1
    chi_square = sum((count - 200) ** 2 / 200 for count in counts.values())
    assert chi_square < 23 + 5 * (2 * 23) ** 0.5
