"""The layout never changes the result: rollouts token for token, losses and gradients of one process."""

from pathlib import Path

import pytest
import torch

from nemo_opdlm.testing.ranks import Ranks
from tests.parallel import runs
from tests.parallel.runs import Layout, Outcome

NUM_UPDATES = 4
LAYOUTS = {
    "TP2": (2, Layout(tensor=2)),
    "TP2+SP": (2, Layout(tensor=2, sequence=True)),
    "PP2": (2, Layout(pipeline=2)),
    "VPP2": (2, Layout(pipeline=2, virtual=2)),
    "CP2": (2, Layout(context=2)),
    "DP2": (2, Layout()),
    "TP2xPP2": (4, Layout(tensor=2, pipeline=2)),
    "TP2+SPxCP2": (4, Layout(tensor=2, sequence=True, context=2)),
    "PP2xDP2": (4, Layout(pipeline=2)),
    "CP2xDP2": (4, Layout(context=2)),
}


@pytest.fixture(scope="module")
def one_process(glassllm: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Path]:
    """The updates of one process, and where its gradients lie."""
    folder = tmp_path_factory.mktemp("one")
    return runs.train(glassllm, Layout(), NUM_UPDATES, gradients=str(folder)), folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_first_updates_are_those_of_one_process(
    name: str,
    one_process: tuple[Outcome, Path],
    glassllm: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    num_ranks, layout = LAYOUTS[name]
    ranks: Ranks = request.getfixturevalue({2: "two_ranks", 4: "four_ranks"}[num_ranks])
    outcomes: list[Outcome] = ranks.run(runs.train, glassllm, layout, NUM_UPDATES, (), str(tmp_path))
    expected, gradients = one_process
    for outcome in outcomes:
        assert_same_rollouts(outcome, expected)
        assert_same_losses(outcome, expected, 1e-5)
    for update in range(NUM_UPDATES):
        ours = runs.read_gradients(glassllm, tmp_path / str(update))
        theirs = runs.read_gradients(glassllm, gradients / str(update))
        assert ours.keys() == theirs.keys() and len(ours) > 20
        for tensor, value in theirs.items():
            assert value.abs().max() > 0, tensor
            assert (ours[tensor] - value).abs().max() <= 1e-4 * value.abs().max(), (update, tensor)


def assert_same_rollouts(found: Outcome, expected: Outcome) -> None:
    assert len(found.rollouts) == len(expected.rollouts) == NUM_UPDATES // 2
    for ours, theirs in zip(found.rollouts, expected.rollouts, strict=True):
        for key, value in theirs.items():
            if key == "confidence":
                torch.testing.assert_close(ours[key], value, atol=1e-4, rtol=0)
            else:
                assert torch.equal(torch.as_tensor(ours[key]), torch.as_tensor(value)), key


def assert_same_losses(found: Outcome, expected: Outcome, tolerance: float) -> None:
    for ours, theirs in zip(found.metrics, expected.metrics, strict=True):
        for key in ("train/loss", "train/kl", "train/grad_norm", "train/agreement", "trained_tokens"):
            assert ours[key] == pytest.approx(theirs[key], rel=tolerance), key
