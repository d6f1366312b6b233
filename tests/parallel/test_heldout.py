"""The held-out divergence does not depend on who judges which answer, nor on whether there are any for a rank."""

from typing import Any

import pytest

from nemo_opdlm.diffusion.state_selection import random_mask
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.models.heldout import HeldoutSet
from nemo_opdlm.testing.ranks import Ranks
from tests.parallel import runs
from tests.parallel.runs import Layout


def divergences(archive: str, layout: Layout, answers: dict[str, Any]) -> list[float]:
    """Of one and of three answers."""
    run = runs.build(archive, layout)
    assert run.teacher is not None
    found = []
    for number in (1, 3):
        trajectory = Trajectory.from_state_dict(answers).index(slice(number))
        states = random_mask(trajectory, run.method.mask_token_id, num_states=1, seed=0, step=1)
        heldout = HeldoutSet.of(run.teacher, trajectory, states)
        found.append(heldout.divergence(run.student.model, micro_batch_size=2))
    return found


@pytest.fixture(scope="module")
def answers(glassllm: str) -> dict[str, Any]:
    return runs.train(glassllm, Layout(), 1).rollouts[0]


@pytest.fixture(scope="module")
def expected(glassllm: str, answers: dict[str, Any]) -> list[float]:
    """What one process finds."""
    return divergences(glassllm, Layout(), answers)


@pytest.mark.parametrize("layout", [Layout(), Layout(context=2), Layout(context=4), Layout(pipeline=2)], ids=str)
def test_a_few_answers_on_four_ranks(
    layout: Layout, glassllm: str, answers: dict[str, Any], expected: list[float], four_ranks: Ranks
) -> None:
    for found in four_ranks.run(divergences, glassllm, layout, answers):
        assert found == pytest.approx(expected, rel=1e-6)
