"""Checkpoints written while training goes on: the same files, whole or not there, errors at the next step."""

import errno
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from omegaconf import OmegaConf

from nemo_opdlm.lightning.async_checkpoint_io import AsyncCheckpointIO
from nemo_opdlm.lightning.checkpoint_io import SHARDED_STATE, MegatronCheckpointIO
from nemo_opdlm.lightning.resume import start_experiment
from nemo_opdlm.lightning.trainer_state import load_trainer_state
from nemo_opdlm.megatron.background import ThreadedCallsQueue
from nemo_opdlm.megatron.checkpoint import load_sharded
from nemo_opdlm.testing.metrics import without_measured
from nemo_opdlm.testing.ranks import Ranks
from tests import forked
from tests.integration.ranks_saving import save_on_two_ranks
from tests.integration.toy_model import ToyModel, disk_full_after, make_model, make_trainer, same, train, weights
from tests.integration.toy_runs import checkpoints, experiment, fit, last_steps, metrics

pytestmark = pytest.mark.filterwarnings("ignore")


class Overlapping(Callback):
    """Holds every write until another step has been made since it was begun, and notes what lies on disk then.

    Args:
        patch: to hook into the queue.
        folder: the run's.
    """

    def __init__(self, patch: pytest.MonkeyPatch, folder: Path) -> None:
        self._folder, self._steps, self._changed = folder, 0.0, threading.Condition()
        self.seen: dict[int, list[str]] = {}
        self.saves = 0
        schedule = ThreadedCallsQueue.schedule
        patch.setattr(ThreadedCallsQueue, "schedule", lambda queue, write, *f: schedule(queue, self._held(write), *f))

    def _held(self, write: Callable[[], None]) -> Callable[[], None]:
        begun = self._steps
        self.saves += 1

        def later() -> None:
            with self._changed:
                assert self._changed.wait_for(lambda: self._steps >= begun + 1, timeout=60)
            write()

        return later

    def _set(self, steps: float) -> None:
        with self._changed:
            self._steps = steps
            self._changed.notify_all()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if (self._folder / "checkpoints").is_dir():
            self.seen[trainer.global_step] = checkpoints(self._folder)
        self._set(trainer.global_step)

    def on_train_end(self, *_: Any) -> None:
        self._set(float("inf"))

    def on_exception(self, *_: Any) -> None:
        self._set(float("inf"))


def checkpoint_of(model: ToyModel, step: int = 2, **content: Any) -> dict[str, Any]:
    return {"global_step": step, **content, SHARDED_STATE: model.sharded_state_dict(include_optimizer=True)}


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def later(saves: AsyncCheckpointIO, checkpoint: dict[str, Any], path: Path) -> list[Path]:
    """Begin a save; the list it returns holds the path when the checkpoint is there."""
    finished: list[Path] = []
    saves.save_checkpoint(checkpoint, path, {"finalize_fn": lambda: finished.append(path)})
    return finished


@contextmanager
def held(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """No write begins before the block has ended."""
    go, schedule = threading.Event(), ThreadedCallsQueue.schedule

    def waiting(write: Callable[[], None]) -> None:
        assert go.wait(60)
        write()

    patch.setattr(ThreadedCallsQueue, "schedule", lambda queue, write, *f: schedule(queue, partial(waiting, write), *f))
    try:
        yield
    finally:
        go.set()


# -- one save --


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_files_are_those_of_a_save_that_waits_although_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    model, saves = make_model(precision=precision), AsyncCheckpointIO()
    train(model, range(2))
    before, live = weights(model), {"tensor": torch.zeros(3), "counts": [1, 2]}
    MegatronCheckpointIO().save_checkpoint(checkpoint_of(model, live=live), tmp_path / "waited.ckpt")
    with held(monkeypatch):
        finished = later(saves, checkpoint_of(model, live=live), tmp_path / "later.ckpt")
        train(model, range(2, 5))
        live["tensor"] += 1
        live["counts"].append(3)  # type: ignore[attr-defined]
        saves.poll()
        assert not finished and not (tmp_path / "later").exists()
    saves.wait()
    assert finished and not same(weights(model), before)
    assert files(tmp_path / "later") == files(tmp_path / "waited")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["later", "waited"]


def test_a_save_without_a_function_to_call_is_there_when_it_returns(tmp_path: Path) -> None:
    model, saves = make_model(), AsyncCheckpointIO()
    train(model, range(1))
    saves.save_checkpoint(checkpoint_of(model), tmp_path / "now.ckpt")
    assert (tmp_path / "now" / "trainer_state.pt").is_file()


def test_a_save_waits_for_one_of_an_earlier_step_or_of_the_same_name(tmp_path: Path) -> None:
    model, saves = make_model(), AsyncCheckpointIO()
    train(model, range(1))
    best = later(saves, checkpoint_of(model, step=1), tmp_path / "best")
    last = later(saves, checkpoint_of(model, step=1), tmp_path / "last")
    assert not best and not last
    last_again = later(saves, checkpoint_of(model, step=1), tmp_path / "last")
    assert best and last and not last_again
    next_step = later(saves, checkpoint_of(model, step=2), tmp_path / "next")
    assert last_again and not next_step
    assert saves.load_checkpoint(tmp_path / "next")["global_step"] == 2 and next_step


def test_full_disk_is_one_line_at_the_next_poll_and_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    model, other, saves = make_model(), make_model(), AsyncCheckpointIO()
    train(model, range(1))
    before = weights(model)
    saves.save_checkpoint(checkpoint_of(model), tmp_path / "checkpoint")
    train(model, range(1, 2))
    with disk_full_after(4096):
        best = later(saves, checkpoint_of(model), tmp_path / "best")
        last = later(saves, checkpoint_of(model), tmp_path / "checkpoint")
        with pytest.raises(OSError, match=f"cannot write the checkpoint in {tmp_path}: ") as error:
            while True:
                saves.poll()
    assert "\n" not in str(error.value) and not best and not last
    saves.wait()
    assert (tmp_path / "checkpoint").is_dir() and not (tmp_path / "best").exists()
    wanted = other.sharded_state_dict(include_optimizer=False, is_loading=True)
    other.load_sharded_state(load_sharded(tmp_path / "checkpoint", wanted))
    assert same(weights(other), before)


def test_place_that_cannot_be_written_to_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    model, saves = make_model(), AsyncCheckpointIO()
    train(model, range(1))
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/file/checkpoint"):
        later(saves, checkpoint_of(model), tmp_path / "file" / "checkpoint")
    saves.wait()


def test_object_that_is_no_plain_value_is_refused_at_once(tmp_path: Path) -> None:
    model, saves = make_model(), AsyncCheckpointIO()
    train(model, range(1))
    with pytest.raises(TypeError, match="checkpoint.thing is a object"):
        later(saves, checkpoint_of(model, thing=object()), tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


def test_saves_given_up_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, saves = make_model(), AsyncCheckpointIO()
    train(model, range(1))
    with held(monkeypatch):
        finished = later(saves, checkpoint_of(model), tmp_path / "checkpoint")
        saves.give_up()
    saves.wait()
    assert not finished and not list(tmp_path.iterdir())


def test_save_given_up_while_it_writes_ends_before_its_folder_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, saves, fsync = make_model(), AsyncCheckpointIO(), os.fsync
    writing, go = threading.Event(), threading.Event()

    def slow(file: int) -> None:
        writing.set()
        assert go.wait(60)
        fsync(file)

    monkeypatch.setattr(os, "fsync", slow)
    train(model, range(1))
    finished = later(saves, checkpoint_of(model), tmp_path / "checkpoint")
    assert writing.wait(60)
    giving_up = threading.Thread(target=saves.give_up)
    giving_up.start()
    giving_up.join(0.2)
    assert giving_up.is_alive() and list(tmp_path.glob(".saving-*"))
    go.set()
    giving_up.join(60)
    assert not finished and not list(tmp_path.iterdir())


def test_two_ranks_finish_together_and_fail_together(two_ranks: Ranks, tmp_path: Path) -> None:
    two_ranks.run(save_on_two_ranks, tmp_path)


# -- training --


EVERY_THIRD = {"every_n_train_steps": 3, "every_n_epochs": None}
#: Before each validation, which must not save the step again.
EVERY_SECOND = {"every_n_train_steps": 2, "every_n_epochs": None}


@pytest.mark.parametrize("when", [{}, EVERY_THIRD, EVERY_SECOND], ids=["validation", "third", "second"])
def test_interrupted_and_resumed_equals_a_run_whose_saves_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: dict[str, Any]
) -> None:
    waited = fit(tmp_path / "waited", 10, **when)
    for killed_before in (5, 8, None):
        with monkeypatch.context() as patch:
            held = Overlapping(patch, tmp_path / "async")
            resumed = fit(
                tmp_path / "async", 10, killed_before=killed_before, async_save=True, callbacks=[held], **when
            )
            assert held.saves
    assert same(weights(waited), weights(resumed)) and resumed.counter == 10
    assert without_measured(metrics(tmp_path / "async")) == without_measured(metrics(tmp_path / "waited"))
    assert checkpoints(tmp_path / "async") == checkpoints(tmp_path / "waited")
    for name in checkpoints(tmp_path / "waited"):
        folders = [tmp_path / run / "checkpoints" / name for run in ("async", "waited")]
        found_state, expected_state = (load_trainer_state(folder) for folder in folders)
        assert found_state["callbacks"].keys() == expected_state["callbacks"].keys()
        found, expected = (files(folder) for folder in folders)
        del found["trainer_state.pt"], expected["trainer_state.pt"]  # they name their folders
        assert found == expected, name


def test_checkpoints_are_marked_and_what_they_replace_stays_until_they_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Overlapping(monkeypatch, tmp_path)
    fit(tmp_path, 7, async_save=True, callbacks=[held], save_top_k=1, mode="max")  # val_loss grows
    steps = {step: [name for name in names if not name.startswith(".")] for step, names in held.seen.items()}
    assert [name.split("step=")[1] for name in steps[3] if "-unfinished" not in name] == []
    marks = [name for name in steps[5] if name.endswith("-unfinished")]
    assert marks and all("step=4" in mark for mark in marks)
    assert [name.split("step=")[1] for name in steps[5] if name not in marks] == ["2", "2-last"]
    # Nothing is left of marks, folders aside and replaced checkpoints.
    assert [name.split("step=")[1] for name in checkpoints(tmp_path)] == ["6", "7-last"]


def test_saves_may_wait_in_one_run_and_not_in_the_next(tmp_path: Path) -> None:
    waited = fit(tmp_path / "waited", 8)
    for max_steps, async_save in ((4, True), (6, False), (8, True)):
        mixed = fit(tmp_path / "mixed", max_steps, async_save=async_save)
    assert same(weights(waited), weights(mixed))
    assert checkpoints(tmp_path / "mixed") == checkpoints(tmp_path / "waited")


def test_best_model_is_restored_from_a_checkpoint_that_was_not_there_yet(tmp_path: Path) -> None:
    # val_loss grows: the best model is the last, whose checkpoint is still being written when it is restored.
    best = {"save_best_model": True, "save_nemo_on_train_end": True, "mode": "max"}
    model = fit(tmp_path, 4, async_save=True, **best)
    expected = fit(tmp_path / "waited", 4, **best)
    assert same(weights(model), weights(expected)) and (tmp_path / "checkpoints" / "default.nemo").is_file()


class TimeIsUp(Callback):
    """Lets exp_manager's time limit end a run after its third step."""

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 3:
            (timer,) = (callback for callback in trainer.callbacks if isinstance(callback, Timer))
            timer._duration = 0.0


def test_run_out_of_time_ends_with_its_last_checkpoint_in_place(tmp_path: Path) -> None:
    """NeMo's timer saves, and leaves by an exception of which Lightning tells no callback."""
    model, trainer = make_model(), make_trainer(10, async_save=True, callbacks=[TimeIsUp()])
    start_experiment(trainer, OmegaConf.merge(experiment(tmp_path), {"max_time_per_run": "00:01:00:00"}))
    trainer.fit(model)
    assert trainer.global_step == 3
    assert [name.split("step=")[1] for name in checkpoints(tmp_path)] == ["2", "3-last"]


@contextmanager
def third_tensor_file(action: Callable[[], None]) -> Iterator[None]:
    """Do something when the third checkpoint of a run (the best one of step 4) has written half of its files."""
    fsync, written = os.fsync, []

    def act(file: int) -> None:
        if os.readlink(f"/proc/self/fd/{file}").endswith(".distcp"):
            written.append(file)
            if len(written) == 3:
                action()
        fsync(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", act)
        yield


def no_space_left() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class SeesStart(Callback):
    """Notes from which step a run goes on."""

    step = -1

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        self.step = trainer.global_step


def assert_resumes_from_step_2(folder: Path, through: ToyModel) -> None:
    start = SeesStart()
    resumed = fit(folder, 6, async_save=True, callbacks=[start])
    assert start.step == 2 and same(weights(resumed), weights(through))
    assert last_steps(folder) == ["6-last"] and len(checkpoints(folder)) == 3


def test_failed_save_ends_the_run_in_one_line_and_the_next_start_resumes_before_it(tmp_path: Path) -> None:
    through = fit(tmp_path / "through", 6)
    folder = tmp_path / "failed" / "checkpoints"
    expected = f"cannot write the checkpoint in {folder}: .*No space left on device$"
    with third_tensor_file(no_space_left), pytest.raises(OSError, match=expected):
        fit(tmp_path / "failed", 6, async_save=True)
    assert not list(folder.glob(".saving-*")) and last_steps(tmp_path / "failed")[0] == "2-last"
    assert_resumes_from_step_2(tmp_path / "failed", through)


def fit_until_killed(folder: Path) -> None:
    with third_tensor_file(kill_this_process):
        fit(folder, 6, async_save=True)


def test_run_killed_while_it_writes_resumes_from_the_checkpoint_before(tmp_path: Path) -> None:
    through = fit(tmp_path / "through", 6)
    victim = forked.server().Process(target=fit_until_killed, args=(tmp_path / "killed",))
    victim.start()
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert any(name.startswith(".saving-") for name in checkpoints(tmp_path / "killed"))
    assert_resumes_from_step_2(tmp_path / "killed", through)
