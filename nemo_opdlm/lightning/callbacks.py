"""What a run tells while it trains: one line of `metrics.jsonl` per optimizer step, and a progress bar."""

import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm
from typing_extensions import override

from nemo_opdlm.diffusion.settings import RolloutProgress, describe

METRICS = "metrics.jsonl"
_TRAINING = "Training"
_TERMINAL_SECONDS, _FILE_SECONDS = 0.5, 60.0
_SHOWN = ("train/loss", "val_loss", "train/lr", "rollout/tokens_per_forward", "rollout/tokens_per_s")


class MetricsFile(Callback):
    """Writes `pl_module.step_metrics`, a dict of plain numbers, as one JSON object per optimizer step.

    A resumed run continues the file: exp_manager moved it to `run_<n>` at the start, from where it is taken back as far
    as the step the run resumes from. A fresh run begins a new file. Numbers that JSON lacks (nan, inf) become null.

    Args:
        log_dir: exp_manager's log folder.
    """

    def __init__(self, log_dir: str | Path) -> None:
        self.path = Path(log_dir) / METRICS
        self._stream: TextIO | None = None
        self._last_step = 0
        self._row: dict[str, Any] = {}
        self._row_start = 0

    @override
    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Recover the lines up to the checkpoint's step, also where nothing is left to train."""
        if self._stream is None:  # NeMo loads the best checkpoint once more at the end of a run
            self._open(trainer, checkpoint["global_step"])

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a new file unless a checkpoint was loaded."""
        if self._stream is None:
            self._open(trainer, 0)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the line of a finished optimizer step."""
        if self._stream is None or trainer.global_step <= self._last_step:
            return
        self._last_step = trainer.global_step
        metrics: Mapping[str, float] = pl_module.step_metrics  # type: ignore[assignment]
        self._row = {"global_step": self._last_step, **{key: _finite(value) for key, value in metrics.items()}}
        self._row_start = self._stream.seek(0, os.SEEK_END)
        self._write_row()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add `val_loss` to the line of the step after which the run was validated."""
        if self._stream is None or not self._row or "val_loss" not in trainer.callback_metrics:
            return
        self._row["val_loss"] = _finite(float(trainer.callback_metrics["val_loss"]))
        self._write_row()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _write_row(self) -> None:
        """Write the last row, over itself where it is there: it is never missing if its step has a checkpoint."""
        assert self._stream is not None
        with _naming(self.path):
            self._stream.seek(self._row_start)
            self._stream.write(json.dumps(self._row, allow_nan=False) + "\n")
            self._stream.flush()
            self._stream.truncate()

    def _open(self, trainer: Trainer, step: int) -> None:
        if not trainer.is_global_zero:
            return
        self._last_step = step
        lines = _lines_until(_previous_file(self.path, step), step)
        with _naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            recovered = self.path.with_suffix(".partial")
            recovered.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            os.replace(recovered, self.path)
            self._stream = self.path.open("r+", encoding="utf-8")
        if lines:
            # The validation after its step may be still to come.
            self._row, self._row_start = json.loads(lines[-1]), sum(len(line) + 1 for line in lines[:-1])


class StepProgressBar(ProgressBar):
    """Optimizer steps done and to do, with the newest of a few metrics; Lightning's own bar counts batches of an epoch.

    On a terminal it is one bar, elsewhere a line every `trainer.log_every_n_steps` steps. While the module rolls out (and
    calls its `rollout_progress`), it tells how far that is: on a terminal twice a second, elsewhere once a minute.

    Args:
        shown: metrics to show, of `pl_module.step_metrics` and Lightning's logged metrics.
        stream: where to; standard error by default.
    """

    def __init__(self, shown: Sequence[str] = _SHOWN, stream: TextIO | None = None) -> None:
        super().__init__()
        self._shown = tuple(shown)
        self._stream = stream
        self._bar: tqdm[Any] | None = None
        self._enabled = True
        self._rollout_start = self._rollout_shown = 0.0

    @override
    def disable(self) -> None:
        self._enabled = False

    @override
    def enable(self) -> None:
        self._enabled = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar at the step the run starts from."""
        if not self._enabled:
            return
        stream = self._stream or sys.stderr
        steps = trainer.max_steps if trainer.max_steps > 0 else None
        interval = float("inf") if not stream.isatty() else 0.1
        # A bar in a log file would be one endless line: there, lines are written by on_train_batch_end.
        self._bar = tqdm(
            total=steps, initial=trainer.global_step, desc=_TRAINING, unit="step", file=stream, mininterval=interval
        )
        pl_module.rollout_progress = self.show_rollout  # type: ignore[assignment]

    def show_rollout(self, progress: RolloutProgress) -> None:
        """Tell how far a rollout is."""
        now = time.monotonic()
        if progress["num_forwards"] == 0:
            self._rollout_start = self._rollout_shown = now
            return
        assert self._bar is not None
        is_terminal = self._bar.fp.isatty()
        if now - self._rollout_shown < (_TERMINAL_SECONDS if is_terminal else _FILE_SECONDS):
            return
        self._rollout_shown = now
        speed = progress["num_tokens"] / (now - self._rollout_start)
        text = f"{_TRAINING}, rollout: {describe(progress)}, {speed:.0f} tokens/s"
        if is_terminal:
            self._bar.set_description(text)
        else:
            self._bar.fp.write(f"{text}\n")
            self._bar.fp.flush()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance to the current step."""
        if self._bar is None or trainer.global_step == self._bar.n:
            return
        known = {**trainer.callback_metrics, **pl_module.step_metrics}  # type: ignore[dict-item]
        values = {name.split("/")[-1]: f"{float(known[name]):.4g}" for name in self._shown if name in known}
        self._bar.set_description(_TRAINING, refresh=False)
        self._bar.set_postfix(values, refresh=False)
        self._bar.update(trainer.global_step - self._bar.n)
        interval: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not self._bar.fp.isatty() and trainer.global_step % interval == 0:
            self._bar.fp.write(f"{self._bar}\n")
            self._bar.fp.flush()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file cannot be written; a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _previous_file(path: Path, step: int) -> Path | None:
    """The newest metrics file that reaches `step`; else the newest there is; None for a fresh run."""
    if step == 0:
        return None
    runs = [run for run in path.parent.glob("run_*") if run.name.removeprefix("run_").isdigit()]
    runs.sort(key=lambda run: int(run.name.removeprefix("run_")), reverse=True)
    files = [file for file in (path, *(run / path.name for run in runs)) if file.is_file()]
    return next((file for file in files if _last_step(file) >= step), files[0] if files else None)


def _last_step(path: Path) -> int:
    return max((json.loads(line)["global_step"] for line in _whole_lines(path)), default=0)


def _lines_until(path: Path | None, step: int) -> list[str]:
    if path is None:
        return []
    return [line for line in _whole_lines(path) if json.loads(line)["global_step"] <= step]


def _whole_lines(path: Path) -> list[str]:
    """Lines of a metrics file; a killed process may have left half of one at its end."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("{") and line.endswith("}")]
