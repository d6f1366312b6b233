"""What a run tells beside metrics.jsonl, and that the loggers of exp_manager tell the same."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.integration.toy_runs import fit
from tests.integration.training_runs import TINY, read_metrics, run, tiny_inputs

CHECKPOINTS = (
    "exp_manager.create_checkpoint_callback=true",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
    "exp_manager.checkpoint_callback_params.save_top_k=1",
)
#: Keeps its length when a run is cut short.
SCHEDULE = "model.optim.sched.max_steps=10"


def in_files(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Metric -> step -> value of the lines of `metrics.jsonl`."""
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        for name in row.keys() - {"global_step"}:
            found.setdefault(name, {})[row["global_step"]] = float("nan") if row[name] is None else row[name]
    return found


def in_tensorboard(log_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric -> what TensorBoard shows of it, in the order in which it was written."""
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_tensorboard_is(log_dir: Path, rows: list[dict[str, Any]]) -> None:
    shown = in_tensorboard(log_dir)
    for name, values in in_files(rows).items():
        steps = [step for step, _ in shown[name]]
        assert steps == sorted(values), name
        assert [value for _, value in shown[name]] == pytest.approx(list(values.values()), rel=1e-5, nan_ok=True), name


def test_tensorboard_shows_each_step_once_also_where_a_killed_run_was_ahead_of_its_checkpoint(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"tensorboard": True, "every_n_train_steps": 3, "every_n_epochs": None}
    fit(tmp_path, 8, killed_before=5, **settings)
    assert [step for step, _ in in_tensorboard(tmp_path)["train/loss"]] == [1, 2, 3, 4, 5]
    fit(tmp_path, 8, **settings)
    rows = read_metrics(tmp_path)
    assert [row["global_step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["global_step"] for row in rows if "time/checkpoint_s" in row] == [2, 3, 4, 6, 8]
    assert all(row["train/grad_norm"] is None for row in rows), "NaN"
    assert_tensorboard_is(tmp_path, rows)


# -- Weights & Biases --


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """What an offline run has logged: LevelDB's log format, in blocks of 32 KiB behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    def records() -> Iterator[Any]:
        data, place, record = file.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", data, place)
            record += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):  # whole, or the last part
                yield wandb_internal_pb2.Record.FromString(record)
                record = b""

    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records()
        if record.WhichOneof("record_type") == "history"
    ]


def test_a_resumed_run_goes_on_in_its_weights_and_biases_run(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    log_dir = tmp_path / "log"
    settings = (
        "exp_manager.create_wandb_logger=true",
        "exp_manager.wandb_logger_kwargs={project: tests, name: tiny, offline: true}",
    )
    overrides = (*TINY, *tiny_inputs(tmp_path), *CHECKPOINTS, *settings, SCHEDULE)
    run(log_dir, *overrides, "trainer.max_steps=3")
    run(log_dir, *overrides, "trainer.max_steps=5")
    rows = read_metrics(log_dir)
    first, second = sorted((log_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert first.name == second.name, "one id"
    for file, steps in ((first, (1, 2, 3)), (second, (4, 5))):
        history = wandb_history(file)
        for name, values in in_files([row for row in rows if row["global_step"] in steps]).items():
            logged = {row["trainer/global_step"]: row[name] for row in history if name in row}
            assert logged == pytest.approx(values), name
            assert sum(name in row for row in history) == len(values), name
