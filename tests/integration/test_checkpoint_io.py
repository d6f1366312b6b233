"""Checkpoints and resuming of a tiny model: nothing is lost, nothing executed, nothing half overwritten."""

import io
import os
import pickle
import re
import signal
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import Timer
from megatron.core import dist_checkpointing
from omegaconf import OmegaConf
from torch.distributed.checkpoint.filesystem import _StorageInfo

from nemo_opdlm.diffusion.settings import RolloutProgress
from nemo_opdlm.lightning import callbacks
from nemo_opdlm.lightning.callbacks import StepProgressBar
from nemo_opdlm.lightning.preemption import Preempted
from nemo_opdlm.lightning.resume import start_experiment
from nemo_opdlm.megatron import atomic_folder
from nemo_opdlm.megatron.checkpoint import load_sharded, save_sharded
from nemo_opdlm.testing.metrics import without_measured
from tests.integration.toy_model import (
    Touch,
    ToyModel,
    disk_full_after,
    make_model,
    make_trainer,
    same,
    train,
    weights,
)
from tests.integration.toy_runs import checkpoints, experiment, fit, last_steps, metrics

pytestmark = pytest.mark.filterwarnings("ignore")


def load(model: ToyModel, folder: Path, include_optimizer: bool = False, **options: Any) -> None:
    wanted = model.sharded_state_dict(include_optimizer, is_loading=True)
    model.load_sharded_state(load_sharded(folder, wanted, **options))


# -- distributed checkpoints --


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_weights_and_optimizer_come_back_bit_for_bit(tmp_path: Path, precision: str) -> None:
    model, other = make_model(precision=precision), make_model(precision=precision)
    train(model, range(3))
    save_sharded(tmp_path / "checkpoint", model.sharded_state_dict(include_optimizer=True))
    train(model, range(3, 6))
    load(other, tmp_path / "checkpoint", include_optimizer=True)
    train(other, range(3, 6))
    assert same(weights(model), weights(other))


def test_weights_load_without_the_optimizer_saved_beside_them(tmp_path: Path) -> None:
    model, other = make_model(), make_model()
    train(model, range(2))
    save_sharded(tmp_path / "checkpoint", model.sharded_state_dict(include_optimizer=True))
    load(other, tmp_path / "checkpoint")
    assert same(weights(model), weights(other))


def test_megatron_itself_reads_the_checkpoint(tmp_path: Path) -> None:
    model, other = make_model(), make_model()
    train(model, range(1))
    save_sharded(tmp_path / "checkpoint", model.sharded_state_dict(include_optimizer=False))
    state = other.sharded_state_dict(include_optimizer=False)
    dist_checkpointing.load(state, str(tmp_path / "checkpoint"), strict="raise_all")
    assert same(weights(model), weights(other))


def test_extra_state_is_never_unpickled(tmp_path: Path) -> None:
    model, folder, victim = make_model(), tmp_path / "checkpoint", tmp_path / "victim"
    save_sharded(folder, model.sharded_state_dict(include_optimizer=False))
    crafted = pickle.dumps(Touch(victim))
    (folder / "__0_9.distcp").write_bytes(crafted)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    poisoned = [index for index in metadata.storage_data if "_extra_state" in index.fqn]
    metadata.storage_data |= {index: _StorageInfo("__0_9.distcp", 0, len(crafted)) for index in poisoned}
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    load(model, folder)
    assert poisoned and not victim.exists()


def test_index_does_not_tell_where_it_was_saved(tmp_path: Path) -> None:
    save_sharded(tmp_path / "checkpoint", make_model().sharded_state_dict(include_optimizer=False))
    assert str(tmp_path).encode() not in (tmp_path / "checkpoint" / ".metadata").read_bytes()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_layers": 3}, r"self_attention.\S+ has shape \[2, \d+.*\], the model needs \[3, \d+.*\]"),
        ({"padded_vocab_size": 40}, r"word_embeddings.weight has shape \[32, 16\], the model needs \[40, 16\]"),
    ],
)
def test_checkpoint_of_another_model_is_refused(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    save_sharded(tmp_path / "checkpoint", make_model().sharded_state_dict(include_optimizer=False))
    with pytest.raises(ValueError, match=expected):
        load(make_model(**changes), tmp_path / "checkpoint")


def test_rows_that_pad_the_vocabulary_may_differ_but_true_rows_may_not(tmp_path: Path) -> None:
    model, other = make_model(vocab_size=30), make_model(vocab_size=30, padded_vocab_size=36)
    train(model, range(1))
    save_sharded(tmp_path / "checkpoint", model.sharded_state_dict(include_optimizer=False))
    load(other, tmp_path / "checkpoint", vocab_size=30)
    assert torch.equal(weights(other)[0][:30], weights(model)[0][:30])
    with pytest.raises(ValueError, match="has shape"):
        load(other, tmp_path / "checkpoint", vocab_size=33)


def test_missing_and_superfluous_tensors_are_refused_by_name(tmp_path: Path) -> None:
    model = make_model()
    state = model.sharded_state_dict(include_optimizer=False)
    norms = {key: value for key, value in state["model"].items() if "final_layernorm" in key}
    save_sharded(tmp_path / "norms", {"model": norms})
    with pytest.raises(ValueError, match=r"norms lacks \d+ tensors that the model needs, such as model\.\S+"):
        load(model, tmp_path / "norms")
    save_sharded(tmp_path / "checkpoint", state)
    with pytest.raises(ValueError, match=r"holds \d+ tensors that the model has no place for, such as model\.\S+"):
        load_sharded(tmp_path / "checkpoint", {"model": norms})
    assert load_sharded(tmp_path / "checkpoint", {"model": norms}, strict=False)["model"].keys() == norms.keys()


def test_damaged_tensor_file_is_refused_in_one_line(tmp_path: Path) -> None:
    model = make_model()
    save_sharded(tmp_path / "checkpoint", model.sharded_state_dict(include_optimizer=False))
    shard = tmp_path / "checkpoint" / "__0_0.distcp"
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(ValueError, match="is damaged") as caught:
        load(model, tmp_path / "checkpoint")
    assert "\n" not in str(caught.value)


def test_one_flipped_bit_of_a_tensor_file_is_refused_in_one_line(tmp_path: Path) -> None:
    model = make_model()
    save_sharded(tmp_path / "checkpoint", model.sharded_state_dict(include_optimizer=False))
    shard = tmp_path / "checkpoint" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is damaged: its content is not what was written$"):
        load(model, tmp_path / "checkpoint")


@pytest.mark.parametrize("content", ["[]", "{", '{"../victim": 1}', '{"__0_0.distcp": "x"}', "[" * 100_000])
def test_checksums_that_are_none_are_refused_in_one_line(tmp_path: Path, content: str) -> None:
    model = make_model()
    save_sharded(tmp_path / "checkpoint", model.sharded_state_dict(include_optimizer=False))
    (tmp_path / "checkpoint" / "checksums.json").write_text(content)
    with pytest.raises(ValueError, match=r"checksums\.json is damaged: .*"):
        load(model, tmp_path / "checkpoint")


def test_full_disk_leaves_the_older_checkpoint_whole(tmp_path: Path) -> None:
    model, other = make_model(), make_model()
    save_sharded(tmp_path / "checkpoint", model.sharded_state_dict(include_optimizer=False))
    before = weights(model)
    train(model, range(1))
    state = model.sharded_state_dict(include_optimizer=False)
    with disk_full_after(4096), pytest.raises(OSError, match="cannot write the checkpoint in"):
        save_sharded(tmp_path / "checkpoint", state)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    load(other, tmp_path / "checkpoint")
    assert same(weights(other), before)


def test_folder_that_is_no_checkpoint_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="is no checkpoint"):
        save_sharded(tmp_path / "work", make_model().sharded_state_dict(include_optimizer=False))
    assert (tmp_path / "work" / "thesis.txt").read_text() == "years"


def test_place_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=f"cannot write {tmp_path}/file/checkpoint"):
        save_sharded(tmp_path / "file" / "checkpoint", make_model().sharded_state_dict(include_optimizer=False))


def test_process_killed_while_replacing_a_checkpoint_loses_nothing(tmp_path: Path) -> None:
    save_sharded(tmp_path / "checkpoint", make_model().sharded_state_dict(include_optimizer=False))
    names = {path.name for path in (tmp_path / "checkpoint").iterdir()}
    (tmp_path / "checkpoint").rename(tmp_path / ".replaced-checkpoint")
    for leftover in (".saving-1", ".removing-2"):
        (tmp_path / leftover).mkdir()
    atomic_folder.settle(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == names


# -- training --


@pytest.mark.parametrize("when", [{}, {"every_n_train_steps": 3, "every_n_epochs": None}])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path: Path, when: dict[str, Any]) -> None:
    """Checkpoints follow validation every second step, or come every third step in between."""
    through = fit(tmp_path / "through", 10, **when)
    fit(tmp_path / "resumed", 10, killed_before=5, **when)
    fit(tmp_path / "resumed", 10, killed_before=8, **when)
    resumed = fit(tmp_path / "resumed", 10, **when)
    assert same(weights(through), weights(resumed))
    assert resumed.counter == through.counter == 10
    assert without_measured(metrics(tmp_path / "resumed")) == without_measured(metrics(tmp_path / "through"))
    assert [row["global_step"] for row in metrics(tmp_path / "resumed")] == list(range(1, 11))
    assert checkpoints(tmp_path / "resumed") == checkpoints(tmp_path / "through")
    assert len(checkpoints(tmp_path / "resumed")) == 3 and len(last_steps(tmp_path / "resumed")) == 1


class SeesValidations(Callback):
    """Notes the steps after which a validation took place."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_validation_end(self, trainer: Any, *_: Any) -> None:
        self.steps.append(trainer.global_step)


@pytest.mark.parametrize(("check_every", "expected"), [(None, [4, 8, 12, 16, 20]), (1, [4, 10, 16])])
@pytest.mark.parametrize("killed_before", [4, 7, 16])
def test_validations_take_place_once_each_whatever_the_restart(
    tmp_path: Path, check_every: int | None, expected: list[int], killed_before: int
) -> None:
    """Checkpoints every third update: before a validation, at the last batch of an epoch of six, after a validation."""
    seen = SeesValidations()
    changes = {"check_val_every_n_epoch": check_every, "val_check_interval": 4}
    for kill in (killed_before, None):
        fit(
            tmp_path,
            20,
            killed_before=kill,
            updates_per_epoch=6,
            callbacks=[seen],
            trainer_changes=changes,
            every_n_train_steps=3,
            every_n_epochs=None,
        )
    assert seen.steps == expected
    assert [row["global_step"] for row in metrics(tmp_path)] == list(range(1, 21))


class LeavesAfterEveryStep(Callback):
    """Lets a run stop after the step that begins: by a signal, or because its time is up."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if self.how == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
            return
        (timer,) = (callback for callback in trainer.callbacks if isinstance(callback, Timer))
        timer._duration = 0.0


@pytest.mark.parametrize(("how", "check_every"), [("signal", None), ("time", 1)])
def test_a_run_that_leaves_after_every_step_makes_every_validation_once(
    tmp_path: Path, how: str, check_every: int | None
) -> None:
    """With and without a validation that is due at the step."""
    whole, parts, changes = SeesValidations(), SeesValidations(), {"check_val_every_n_epoch": check_every}
    fit(tmp_path / "whole", 5, updates_per_epoch=3, callbacks=[whole], trainer_changes=changes)
    for step in range(1, 5):
        trainer = make_trainer(5, callbacks=[parts, LeavesAfterEveryStep(how)], **changes)
        start_experiment(trainer, OmegaConf.merge(experiment(tmp_path / "parts"), {"max_time_per_run": "00:01:00:00"}))
        with pytest.raises(Preempted) if how == "signal" else nullcontext():
            trainer.fit(make_model(updates_per_epoch=3))
        assert trainer.global_step == step
    fit(tmp_path / "parts", 5, updates_per_epoch=3, callbacks=[parts], trainer_changes=changes)
    assert parts.steps == whole.steps
    assert without_measured(metrics(tmp_path / "parts")) == without_measured(metrics(tmp_path / "whole"))


def test_finished_run_started_again_keeps_its_metrics_and_trains_nothing(tmp_path: Path) -> None:
    model = fit(tmp_path, 4)
    before = metrics(tmp_path)
    again = fit(tmp_path, 4)
    assert same(weights(model), weights(again)) and metrics(tmp_path) == before
    fit(tmp_path, 6)
    assert metrics(tmp_path)[:4] == before and len(metrics(tmp_path)) == 6


def test_run_begun_anew_in_the_same_folder_begins_its_metrics_anew(tmp_path: Path) -> None:
    fit(tmp_path, 1)
    assert checkpoints(tmp_path) == [name for name in checkpoints(tmp_path) if name.endswith("-last")]
    for folder in (tmp_path / "checkpoints").iterdir():
        atomic_folder.remove(folder)
    fit(tmp_path, 2)
    assert [row["global_step"] for row in metrics(tmp_path)] == [1, 2]


def test_metrics_hold_plain_json(tmp_path: Path) -> None:
    fit(tmp_path, 1)
    assert metrics(tmp_path)[0]["train/grad_norm"] is None  # the toy's is nan
    assert isinstance(metrics(tmp_path)[0]["train/loss"], float)


def test_run_killed_while_saving_its_last_checkpoint_resumes_from_the_one_before(tmp_path: Path) -> None:
    fit(tmp_path, 4)
    (last,) = (tmp_path / "checkpoints").glob("*-last")
    last.with_name(last.name + "-unfinished").touch()  # NeMo's mark: it would refuse to resume
    (tmp_path / "checkpoints" / ".saving-123456789abc").mkdir()
    resumed = fit(tmp_path, 6)
    assert resumed.counter == 6
    assert last_steps(tmp_path) == ["6-last"] and len(checkpoints(tmp_path)) == 3


def test_run_killed_between_two_last_checkpoints_resumes_from_the_newer(tmp_path: Path) -> None:
    fit(tmp_path / "a", 2)
    fit(tmp_path / "b", 4)
    (older,) = (tmp_path / "a" / "checkpoints").glob("*-last")
    older.rename(tmp_path / "b" / "checkpoints" / older.name)
    resumed = fit(tmp_path / "b", 6)
    assert resumed.counter == 6 and last_steps(tmp_path / "b") == ["6-last"]


def test_other_checkpoint_settings_leave_one_last_checkpoint(tmp_path: Path) -> None:
    fit(tmp_path, 4, every_n_train_steps=2, every_n_epochs=None)
    fit(tmp_path, 6, every_n_train_steps=3, every_n_epochs=None)
    assert last_steps(tmp_path) == ["6-last"]
    fit(tmp_path, 8, every_n_train_steps=2, every_n_epochs=None)
    assert last_steps(tmp_path) == ["8-last"]


def test_trainer_state_that_would_execute_code_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, 2)
    (last,) = (tmp_path / "checkpoints").glob("*-last")
    torch.save({"global_step": 2, "loops": Touch(tmp_path / "victim")}, last / "trainer_state.pt")
    with pytest.raises(ValueError, match="trainer_state.pt is refused: it holds more than plain data"):
        fit(tmp_path, 4)
    assert not (tmp_path / "victim").exists()


class SeesAutocast(Callback):
    """Notes whether Lightning put the step into an autocast region, and which precision the trainer reports."""

    seen: tuple[bool, str] | None = None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.seen = (torch.is_autocast_enabled("cpu"), trainer.precision)


@pytest.mark.parametrize(
    ("precision", "name"), [("bf16-mixed", "bf16-mixed"), ("bf16", "bf16-mixed"), ("32", "32-true")]
)
def test_lightning_adds_no_autocast(tmp_path: Path, precision: str, name: str) -> None:
    callback = SeesAutocast()
    model = fit(tmp_path, 1, callbacks=[callback], trainer_changes={"precision": precision})
    assert callback.seen == (False, name)
    assert all(parameter.dtype == torch.float32 for parameter in model.student.parameters())


def test_progress_bar_counts_optimizer_steps(tmp_path: Path) -> None:
    stream = io.StringIO()
    changes = {"enable_progress_bar": True, "log_every_n_steps": 2}
    fit(tmp_path, 4, callbacks=[StepProgressBar(stream=stream)], trainer_changes=changes)
    lines = [line for line in stream.getvalue().replace("\r", "\n").splitlines() if "loss=" in line]
    assert any("2/4" in line for line in lines) and any("4/4" in line for line in lines)


def test_a_long_rollout_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(callbacks, "_FILE_SECONDS", 0.0)
    stream, module = io.StringIO(), SimpleNamespace()
    bar = StepProgressBar(stream=stream)
    bar.on_train_start(SimpleNamespace(max_steps=4, global_step=0), module)  # type: ignore[arg-type]
    start = RolloutProgress(num_forwards=0, num_row_forwards=0, num_active=8, num_rows=8, num_tokens=0)
    module.rollout_progress(start)
    module.rollout_progress({**start, "num_forwards": 9, "num_row_forwards": 48, "num_active": 5, "num_tokens": 60})
    line = r"Training, rollout: 3/8 responses, 1\.25 tokens per forward, \d+ tokens/s$"
    assert re.search(line, stream.getvalue(), re.MULTILINE)
