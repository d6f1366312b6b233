"""A run killed at any moment loses the steps since its last checkpoint and nothing else."""

import random
import signal
from collections import Counter
from pathlib import Path

import pytest

from nemo_opdlm.lightning.trainer_state import load_trainer_state
from nemo_opdlm.megatron.checksums import verify
from nemo_opdlm.megatron.safe_metadata import check
from tests.faults.conftest import Scene, newest_checkpoint, tensor_files
from tests.faults.victims import PHASES, Outcome, Strike

SEED = 2606
#: A run is killed so often before it may end.
_KILLS_PER_RUN = 4


def visible_checkpoints(log_dir: Path) -> list[Path]:
    """What a run that starts would take for checkpoints."""
    folders = [path for path in (log_dir / "checkpoints").glob("*") if path.is_dir() and not path.name.startswith(".")]
    return [folder for folder in folders if not folder.with_name(f"{folder.name}-unfinished").exists()]


def assert_whole(log_dir: Path, scene: Scene) -> None:
    """Every checkpoint that is not marked has its index, its plain state and files of full length."""
    expected = {name: len(content) for name, content in tensor_files(newest_checkpoint(scene.log_dir)).items()}
    for folder in visible_checkpoints(log_dir):
        check(folder)
        verify(folder, 0, 1)
        assert load_trainer_state(folder)["global_step"] > 0
        found = {name: len(content) for name, content in tensor_files(folder).items()}
        assert found.keys() == expected.keys()
        assert all(found[name] == expected[name] for name in found if name.endswith(".distcp"))


def killed(scene: Scene, log_dir: Path, draw: random.Random) -> tuple[Outcome, str] | None:
    """Start or resume a run and kill it at random: by the clock, or before some event of it; None if it ended before.

    Of two ranks both are killed, or one alone, and the other has to end by itself.
    """
    alone = scene.num_ranks > 1 and draw.random() < 0.25
    if draw.random() < 0.3 and not alone:
        outcome = scene.run(log_dir, kill_after_s=draw.uniform(0.5, 1.0) * scene.outcome.seconds)
    else:
        rank = draw.randrange(scene.num_ranks)
        phase = draw.choice("srtumccc")
        event = draw.randrange(scene.outcome.events[rank].count(phase) or 1)
        outcome = scene.run(log_dir, strike=Strike(signal.SIGKILL, phase, event, rank), alone=alone)
    dead = [rank for rank, code in enumerate(outcome.codes) if code == -signal.SIGKILL]
    if not dead:
        assert outcome.codes == [0] * scene.num_ranks
        return None
    if alone:
        (other,) = set(range(scene.num_ranks)) - set(dead)
        assert outcome.codes[other] in (1, 2) and len(outcome.errors(other)) == 1, outcome.outputs[other][-2000:]
    return outcome, outcome.events[dead[0]][-1:] or "s"


@pytest.mark.timeout(1800)
def test_a_killed_run_becomes_the_one_that_was_not(
    scene: Scene, kills: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, hits, runs = random.Random(SEED), Counter[str](), 0
    while hits.total() < kills:
        log_dir = tmp_path / f"run{runs}"
        runs += 1
        for _ in range(min(_KILLS_PER_RUN, kills - hits.total())):
            hit = killed(scene, log_dir, draw)
            if hit is None:
                break
            hits[hit[1]] += 1
            assert_whole(log_dir, scene)
        last = scene.run(log_dir)
        assert last.codes == [0] * scene.num_ranks, last.outputs[0][-3000:]
        scene.assert_same_end(log_dir)
    with capsys.disabled():
        where = ", ".join(f"{PHASES[letter]} {hits[letter]}" for letter in PHASES)
        print(f"\n{kills} kills of {runs} runs on {scene.num_ranks} ranks: {where}")
