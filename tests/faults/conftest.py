"""Processes to strike, their inputs, and what a run leaves behind that nobody strikes."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from nemo_opdlm.lightning.trainer_state import load_trainer_state
from nemo_opdlm.testing.metrics import without_measured
from tests.faults.victims import Outcome, Victims
from tests.integration.training_runs import COMMON, TINY, read_metrics, tiny_inputs

#: Six updates of three rollout batches, a validation every second, a checkpoint after each.
SETTINGS = (
    *COMMON,
    *TINY,
    "trainer.max_steps=6",
    "exp_manager.create_checkpoint_callback=true",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
    "exp_manager.checkpoint_callback_params.save_top_k=2",
)


@dataclass(frozen=True)
class Scene:
    """A number of tensor-parallel ranks, and the run that nothing happens to."""

    victims: Victims
    inputs: tuple[str, ...]
    num_ranks: int
    log_dir: Path
    outcome: Outcome

    def arguments(self, log_dir: Path, *overrides: str) -> list[str]:
        return command(self.inputs, self.num_ranks, log_dir, *overrides)

    def run(self, log_dir: Path, *overrides: str, **options: Any) -> Outcome:
        """The same command for this folder, again."""
        return self.victims.run(self.arguments(log_dir, *overrides), self.num_ranks, **options)

    def assert_same_end(self, log_dir: Path) -> None:
        """Metrics, weights, moments, and all that a resumed run would go on with are those of the uninterrupted run."""
        assert_same_rows(read_metrics(log_dir), read_metrics(self.log_dir))
        found, expected = (newest_checkpoint(folder) for folder in (log_dir, self.log_dir))
        assert tensor_files(found) == tensor_files(expected)
        assert plain_state(found) == plain_state(expected)
        assert checkpoint_names(log_dir) == checkpoint_names(self.log_dir)


def command(inputs: tuple[str, ...], num_ranks: int, log_dir: Path, *overrides: str) -> list[str]:
    """Arguments of the training script."""
    layout = (f"trainer.devices={num_ranks}", f"model.tensor_model_parallel_size={num_ranks}")
    given = (*SETTINGS, *inputs, *layout, f"exp_manager.explicit_log_dir={log_dir}", *overrides)
    return list({item.partition("=")[0]: item for item in given}.values())


def assert_same_rows(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Bitwise, but for what was measured."""
    assert without_measured(found) == without_measured(expected)


def newest_checkpoint(log_dir: Path) -> Path:
    """The one that a run resumes from."""
    (last,) = (log_dir / "checkpoints").glob("*-last")
    return last


def checkpoint_names(log_dir: Path) -> set[str]:
    """What lies in the folder of checkpoints; the last one is named after the newest val_loss that it was saved with."""
    names = {path.name for path in (log_dir / "checkpoints").iterdir()}
    return {name.partition("-step=")[2] if name.endswith("-last") else name for name in names}


def tensor_files(checkpoint: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in checkpoint.iterdir() if file.name != "trainer_state.pt"}


def plain_state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds of the method and its schedules, by name."""
    state = load_trainer_state(checkpoint)
    return dict(_flat("", {name: state[name] for name in ("global_step", "opdlm", "lr_scheduler")}))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{name}.{key}", item)
    else:
        yield name, value.tolist() if isinstance(value, Tensor) else value


@pytest.fixture(scope="session")
def victims(tmp_path_factory: pytest.TempPathFactory) -> Victims:
    return Victims(tmp_path_factory.mktemp("victims"))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="session")
def kills(request: pytest.FixtureRequest) -> int:
    """How often a run is killed."""
    return int(request.config.getoption("--kills"))


@pytest.fixture
def thorough(kills: int) -> None:
    """Of tests that a plain run of all tests leaves out for their time."""
    if kills < 2:
        pytest.skip("left to make fault-injection")


@pytest.fixture(scope="session", params=[1, 2], ids=["TP1", "TP2"])
def scene(
    request: pytest.FixtureRequest,
    victims: Victims,
    inputs: tuple[str, ...],
    tmp_path_factory: pytest.TempPathFactory,
) -> Scene:
    log_dir = tmp_path_factory.mktemp(f"uninterrupted{request.param}")
    outcome = victims.run(command(inputs, request.param, log_dir), request.param)
    assert outcome.codes == [0] * request.param, outcome.outputs[0][-3000:]
    return Scene(victims, inputs, request.param, log_dir, outcome)
