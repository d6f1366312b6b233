"""What an evaluation of one's own says along a run: `evaluations.jsonl`."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from nemo_opdlm.lightning.step_lines import StepLines

EVALUATIONS = "evaluations.jsonl"


class EvaluationLog(Callback):
    """Evaluates the student before the first update and after each validation; every rank does.

    A resumed run continues the file (`StepLines`).

    Args:
        log_dir: exp_manager's log folder.
        evaluate: figures of the module that is trained, by name.
    """

    def __init__(self, log_dir: str | Path, evaluate: Callable[[Any], Mapping[str, float]]) -> None:
        self._lines = StepLines(Path(log_dir) / EVALUATIONS)
        self._evaluate = evaluate
        self._last_step = -1

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Recover the lines up to the checkpoint's step."""
        if self._last_step < 0:
            self._open(trainer, checkpoint["global_step"])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new file, with the student as it is before the first update, unless a checkpoint was loaded."""
        if self._last_step < 0:
            self._open(trainer, 0)
            self._write(pl_module, 0)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate once after a step."""
        if trainer.global_step > self._last_step:
            self._write(pl_module, trainer.global_step)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the file."""
        self._lines.close()

    def _open(self, trainer: Trainer, step: int) -> None:
        last: Mapping[str, Any] = self._lines.open(step) if trainer.is_global_zero else {}
        last = trainer.strategy.broadcast(last)
        # The evaluation after the checkpoint's step may be still to come.
        self._last_step = step if last else step - 1

    def _write(self, module: LightningModule, step: int) -> None:
        self._last_step = step
        figures = self._evaluate(module)
        if self._lines.is_open:
            self._lines.write({"global_step": step, **figures})


def read_evaluations(log_dir: str | Path) -> list[dict[str, float]]:
    """The lines of a run that has ended."""
    return [json.loads(line) for line in (Path(log_dir) / EVALUATIONS).read_text(encoding="utf-8").splitlines()]
