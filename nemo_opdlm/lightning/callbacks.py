"""What a run tells while it trains: one line of `metrics.jsonl` per optimizer step, and a progress bar."""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm
from typing_extensions import override

from nemo_opdlm.diffusion.settings import RolloutProgress, describe
from nemo_opdlm.lightning.loggers import NEMO_NAMES, forget_after, log_scalars
from nemo_opdlm.lightning.step_file import StepFile
from nemo_opdlm.lightning.strategy import MegatronStrategy

METRICS = "metrics.jsonl"
_TRAINING = "Training"
_TERMINAL_SECONDS, _FILE_SECONDS = 0.5, 60.0
_SHOWN = ("train/loss", "val_loss", "train/lr", "rollout/tokens_per_forward", "rollout/tokens_per_s")


class MetricsFile(StepFile):
    """Writes `pl_module.step_metrics`, a dict of plain numbers, as one JSON object per optimizer step (`StepLines`).

    What stands in the file also reaches exp_manager's loggers, at the same `global_step`; Lightning would count from 0, log
    a rollout's figures again at every update on it, and lose count at every restart. Numbers that JSON lacks (nan, inf)
    become null. What becomes known after a line was written is added to it: `val_loss`, and how long validation and
    checkpoint took.

    Args:
        log_dir: exp_manager's log folder.
    """

    def __init__(self, log_dir: str | Path) -> None:
        super().__init__(Path(log_dir) / METRICS)
        self._row: dict[str, Any] = {}
        self._validation_start = 0.0

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the line of a finished optimizer step."""
        if not self._lines.is_open or trainer.global_step <= self._last_step:
            return
        self._last_step = trainer.global_step
        metrics: Mapping[str, float] = pl_module.step_metrics  # type: ignore[assignment]
        self._row = {"global_step": self._last_step, **{key: _finite(value) for key, value in metrics.items()}}
        self._lines.write(self._row)
        same = {theirs: metrics[ours] for ours, theirs in NEMO_NAMES.items() if ours in metrics}
        log_scalars(trainer, {**metrics, **same}, self._last_step)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._validation_start = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add what the validation gave to the line of the step after which it was made."""
        if "val_loss" in trainer.callback_metrics:
            seconds = time.perf_counter() - self._validation_start
            self._add(trainer, {"val_loss": float(trainer.callback_metrics["val_loss"]), "time/validation_s": seconds})

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Add how long the checkpoints took that were saved since the last step."""
        self._add_checkpoint_time(trainer)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same after the last step."""
        self._add_checkpoint_time(trainer)

    def _add_checkpoint_time(self, trainer: Trainer) -> None:
        assert isinstance(trainer.strategy, MegatronStrategy)
        if seconds := trainer.strategy.take_checkpoint_seconds():
            self._add(trainer, {"time/checkpoint_s": seconds})

    def _add(self, trainer: Trainer, metrics: Mapping[str, float]) -> None:
        if not self._lines.is_open or not self._row:
            return
        # A run killed in a validation makes it again; the loggers may have its figures from before.
        new = {key: value for key, value in metrics.items() if key not in self._row}
        self._row |= {key: _finite(value) for key, value in new.items()}
        self._lines.rewrite_last(self._row)
        log_scalars(trainer, new, self._last_step)

    @override
    def _opened(self, trainer: Trainer, row: dict[str, Any]) -> None:
        self._row = row
        if self._last_step > 0:
            forget_after(trainer, self._last_step)


class StepProgressBar(ProgressBar):
    """Optimizer steps done and to do, with the newest of a few metrics; Lightning's own bar counts batches of an epoch.

    On a terminal it is one bar, elsewhere a line every `trainer.log_every_n_steps` steps; only the first rank has one. It
    names the phase that a step is in (the module calls its `phase_began`) and tells how far a rollout is, or the teacher's
    answers to held-out prompts (`rollout_progress`): on a terminal twice a second, elsewhere once a minute.

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
        self._phase = "rollout"
        self._rollout_start = self._shown_at = 0.0

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
        self._shown_at = time.monotonic()
        pl_module.rollout_progress = self.show_rollout  # type: ignore[assignment]
        pl_module.phase_began = self.show_phase  # type: ignore[assignment]

    def show_phase(self, name: str) -> None:
        """Name what is done now."""
        assert self._bar is not None
        self._phase = name
        if self._bar.fp.isatty() or time.monotonic() - self._shown_at >= _FILE_SECONDS:
            self._show(name)

    def show_rollout(self, progress: RolloutProgress) -> None:
        """Tell how far a rollout is."""
        now = time.monotonic()
        if progress["num_forwards"] == 0:
            self._rollout_start = self._shown_at = now
            return
        assert self._bar is not None
        if now - self._shown_at >= (_TERMINAL_SECONDS if self._bar.fp.isatty() else _FILE_SECONDS):
            speed = progress["num_tokens"] / (now - self._rollout_start)
            self._show(f"{self._phase}: {describe(progress)}, {speed:.0f} tokens/s")

    @override
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Tell that a checkpoint is written."""
        if self._bar is not None:
            self.show_phase("checkpoint")

    def _show(self, text: str) -> None:
        assert self._bar is not None
        self._shown_at = time.monotonic()
        if self._bar.fp.isatty():
            self._bar.set_description(f"{_TRAINING}, {text}")
        else:
            self._bar.fp.write(f"{_TRAINING}, {text}\n")
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
            self._shown_at = time.monotonic()
            self._bar.fp.write(f"{self._bar}\n")
            self._bar.fp.flush()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            pl_module.rollout_progress = pl_module.phase_began = None  # type: ignore[assignment]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
