"""Longer runs: on recorded rollouts the curve does not depend on the layout, nor on a change of layout in the middle."""

from pathlib import Path
from typing import Any

import pytest

from nemo_opdlm.testing.metrics import without_measured
from nemo_opdlm.testing.ranks import Ranks
from tests.parallel import runs
from tests.parallel.runs import LAYOUTS, Layout, Outcome

NUM_UPDATES = runs.MAX_STEPS
#: After three of four updates: in the middle of a rollout batch.
CUT = 3
#: Of the layouts of two ranks, and one of four.
NAMES = ("TP2", "TP2+SP", "PP2", "VPP2", "CP2", "DP2", "TP2xPP2")


@pytest.fixture(scope="module")
def recorded(glassllm: str) -> Outcome:
    """One process's uninterrupted run."""
    return runs.train(glassllm, Layout(), NUM_UPDATES)


class Fleet:
    """Runs a function in any layout, in as many processes as it needs."""

    def __init__(self, request: pytest.FixtureRequest) -> None:
        self.request = request

    def train(self, name: str, *args: Any, **kwargs: Any) -> list[Outcome]:
        num_ranks, layout = LAYOUTS[name]
        if num_ranks == 1:
            return [runs.train(args[0], layout, *args[1:], **kwargs)]
        ranks: Ranks = self.request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[num_ranks])
        return ranks.run(runs.train_by_name, args[0], layout, *args[1:], kwargs)


@pytest.fixture
def fleet(request: pytest.FixtureRequest) -> Fleet:
    return Fleet(request)


def assert_same_curve(found: Outcome, expected: list[dict[str, float]], tolerance: float) -> None:
    assert len(found.metrics) == len(expected)
    for ours, theirs in zip(found.metrics, expected, strict=True):
        for key in ("train/loss", "train/kl", "train/grad_norm", "train/lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), key


@pytest.mark.parametrize("name", NAMES)
def test_recorded_rollouts_give_the_same_curve_in_every_layout(
    name: str, recorded: Outcome, glassllm: str, fleet: Fleet
) -> None:
    for outcome in fleet.train(name, glassllm, NUM_UPDATES, replayed=recorded.rollouts):
        assert_same_curve(outcome, recorded.metrics, 1e-4)


@pytest.fixture(scope="module", params=["bf16", "bf16-mixed"])
def half_precision(request: pytest.FixtureRequest, recorded: Outcome, glassllm: str) -> tuple[dict[str, Any], Outcome]:
    """What sets a precision, and one process's updates in it."""
    options = {"overrides": (f"trainer.precision={request.param}",), "replayed": recorded.rollouts}
    return options, runs.train(glassllm, Layout(), 6, **options)


@pytest.mark.parametrize("name", ["TP2+SP", "PP2", "VPP2", "CP2"])
def test_half_precision_is_the_same_in_every_layout_to_its_own_rounding(
    name: str, half_precision: tuple[dict[str, Any], Outcome], glassllm: str, fleet: Fleet
) -> None:
    options, expected = half_precision
    for outcome in fleet.train(name, glassllm, 6, **options):
        assert_same_curve(outcome, expected.metrics, 1e-2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("1", "TP2"),
        ("TP2", "PP2"),
        ("PP2", "TP2xPP2"),
        ("TP2xPP2", "DP2"),
        ("DP2", "1"),
        ("CP2", "VPP2"),
        ("VPP2", "CP2"),
    ],
)
def test_a_checkpoint_of_one_layout_continues_its_curve_in_another(
    before: str, after: str, recorded: Outcome, glassllm: str, fleet: Fleet, tmp_path: Path
) -> None:
    """The unfinished rollout batch comes from the checkpoint, the next ones from the recording."""
    folder = str(tmp_path / "checkpoint")
    first = fleet.train(before, glassllm, CUT, replayed=recorded.rollouts, save_to=folder)
    assert_same_curve(first[0], recorded.metrics[:CUT], 1e-4)
    resume = (folder, first[0].plain)
    for outcome in fleet.train(after, glassllm, 8, replayed=recorded.rollouts, resume_from=resume):
        assert_same_curve(outcome, recorded.metrics[CUT:8], 1e-4)


@pytest.mark.parametrize("name", ["TP2", "PP2", "CP2", "DP2", "TP2xPP2"])
def test_a_run_resumed_in_its_own_layout_is_bitwise_the_uninterrupted_one(
    name: str, glassllm: str, fleet: Fleet, tmp_path: Path
) -> None:
    folder = str(tmp_path / "checkpoint")
    whole = fleet.train(name, glassllm, 6, save_to=folder, save_after=CUT)
    for outcome, expected in zip(
        fleet.train(name, glassllm, 6, resume_from=(folder, whole[0].plain)), whole, strict=True
    ):
        assert without_measured(outcome.metrics) == without_measured(expected.metrics[CUT:])
