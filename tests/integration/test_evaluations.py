"""`evaluations.jsonl` of a run that was stopped is that of one which was not."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nemo_opdlm.lightning.evaluations import EvaluationLog, read_evaluations


def trainer(step: int, rank: int = 0) -> Any:
    return SimpleNamespace(
        global_step=step, is_global_zero=rank == 0, strategy=SimpleNamespace(broadcast=lambda value: value)
    )


def log(folder: Path) -> EvaluationLog:
    return EvaluationLog(folder, lambda module: {"kl": module.value})


def module(value: float) -> Any:
    return SimpleNamespace(value=value)


def steps(folder: Path) -> list[tuple[float, float]]:
    return [(row["global_step"], row["kl"]) for row in read_evaluations(folder)]


def test_the_student_is_evaluated_before_the_first_update_and_once_after_each_validation(tmp_path: Path) -> None:
    callback = log(tmp_path)
    callback.on_train_start(trainer(0), module(9.0))
    for step in (4, 8, 8):
        callback.on_validation_end(trainer(step), module(step))
    callback.teardown(trainer(8), module(0.0), "fit")
    assert steps(tmp_path) == [(0, 9.0), (4, 4.0), (8, 8.0)]


def test_a_resumed_run_goes_on_at_its_checkpoint(tmp_path: Path) -> None:
    first = log(tmp_path)
    first.on_train_start(trainer(0), module(9.0))
    for step in (4, 8):
        first.on_validation_end(trainer(step), module(step))
    first.teardown(trainer(8), module(0.0), "fit")
    again = log(tmp_path)
    again.on_load_checkpoint(trainer(0), module(0.0), {"global_step": 4})
    again.on_train_start(trainer(4), module(0.0))
    again.on_validation_end(trainer(4), module(-1.0))
    again.on_validation_end(trainer(8), module(8.5))
    assert steps(tmp_path) == [(0, 9.0), (4, 4.0), (8, 8.5)]


def test_the_evaluation_due_at_the_checkpoint_is_made_up_for(tmp_path: Path) -> None:
    (tmp_path / "evaluations.jsonl").write_text(json.dumps({"global_step": 0, "kl": 9.0}) + "\n", encoding="utf-8")
    callback = log(tmp_path)
    callback.on_load_checkpoint(trainer(0), module(0.0), {"global_step": 4})
    callback.on_validation_end(trainer(4), module(4.0))
    assert steps(tmp_path) == [(0, 9.0), (4, 4.0)]


def test_other_ranks_evaluate_and_write_nothing(tmp_path: Path) -> None:
    asked = []
    callback = EvaluationLog(tmp_path, lambda module: asked.append(module) or {})
    callback.on_train_start(trainer(0, rank=1), module(9.0))
    assert len(asked) == 1 and not list(tmp_path.iterdir())
