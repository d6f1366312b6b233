"""The held-out divergence does not depend on who judges which answer, nor on whether there are any for a rank."""

import pytest

from nemo_opdlm.diffusion.state_selection import random_mask
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.models.heldout import HeldoutSet
from nemo_opdlm.testing.ranks import Ranks
from tests.parallel import runs
from tests.parallel.runs import Layout


def divergence(archive: str, layout: Layout, answers: dict[str, object]) -> float:
    run = runs.build(archive, layout)
    trajectory = Trajectory.from_state_dict(answers)
    states = random_mask(trajectory, run.method.mask_token_id, num_states=1, seed=0, step=1)
    assert run.teacher is not None
    return HeldoutSet.of(run.teacher, trajectory, states).divergence(run.student.model, micro_batch_size=2)


@pytest.mark.parametrize("num_answers", [1, 3])
@pytest.mark.parametrize("layout", [Layout(), Layout(context=2), Layout(context=4), Layout(pipeline=2)], ids=str)
def test_a_few_answers_on_four_ranks(layout: Layout, num_answers: int, glassllm: str, four_ranks: Ranks) -> None:
    recorded = runs.train(glassllm, Layout(), 1).rollouts[0]
    answers = Trajectory.from_state_dict(recorded).index(slice(num_answers)).state_dict()
    expected = divergence(glassllm, Layout(), answers)
    for found in four_ranks.run(divergence, glassllm, layout, answers):
        assert found == pytest.approx(expected, rel=1e-6)
