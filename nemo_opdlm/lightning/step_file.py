"""A callback with a file of `StepLines`: opened where a run begins or resumes, closed where it ends."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from nemo_opdlm.lightning.step_lines import StepLines


class StepFile(Callback):
    """Keeps the file of a subclass open on the first rank while a run trains; a resumed run continues it.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self._lines = StepLines(path)
        self._last_step = 0

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Recover the lines up to the checkpoint's step, also where nothing is left to train."""
        if not self._lines.is_open:  # NeMo loads the best checkpoint once more at the end of a run
            self._open(trainer, checkpoint["global_step"])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new file unless a checkpoint was loaded."""
        if not self._lines.is_open:
            self._open(trainer, 0)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the file."""
        self._lines.close()

    def _open(self, trainer: Trainer, step: int) -> None:
        if trainer.is_global_zero:
            self._last_step = step
            self._opened(trainer, self._lines.open(step))

    def _opened(self, trainer: Trainer, row: dict[str, Any]) -> None:
        """Take note of the line of the step that the run resumes from; empty where there is none."""
