"""What the student writes, every so many steps: a table in the log and the loggers, whole texts in `samples.jsonl`."""

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typing_extensions import override

from nemo_opdlm.lightning.loggers import log_table
from nemo_opdlm.lightning.step_file import StepFile

SAMPLES = "samples.jsonl"
_WIDTH, _SHOWN_CHARACTERS = 120, 400


@dataclass(frozen=True)
class Sample:
    """One rollout as text.

    Attributes:
        rollout_step: the rollout batch it comes from.
        sample_id: its global number.
        prompt, response: with all special tokens.
        finish_reason: `end_of_turn` or `length`.
        response_len: tokens of the response.
        num_forwards: denoising forwards it took.
    """

    rollout_step: int
    sample_id: int
    prompt: str
    response: str
    finish_reason: str
    response_len: int
    num_forwards: int


class SampledModule(Protocol):
    """What a LightningModule offers so that its samples can be logged."""

    def samples(self, count: int) -> list[Sample]:
        """The first rollouts of the batch that the last update trained on."""
        ...


class SampleLog(StepFile):
    """Logs the first rollouts of the current batch after the first update and after every `every_n_steps` updates.

    Nothing is generated for it, and only the first rank does it. A resumed run continues `samples.jsonl` (`StepLines`).

    Args:
        log_dir: exp_manager's log folder.
        every_n_steps: optimizer steps between two tables.
        num_samples: rows of a table.
    """

    def __init__(self, log_dir: str | Path, every_n_steps: int, num_samples: int) -> None:
        super().__init__(Path(log_dir) / SAMPLES)
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the samples where they are due."""
        step = trainer.global_step
        is_due = step == 1 or step % self.every_n_steps == 0
        if not self._lines.is_open or not is_due or step == self._last_step:
            return
        self._last_step = step
        module: SampledModule = pl_module  # type: ignore[assignment]
        samples = module.samples(self.num_samples)
        for sample in samples:
            self._lines.write({"global_step": step, **asdict(sample)})
        self._show(trainer, samples, step)

    def _show(self, trainer: Trainer, samples: Sequence[Sample], step: int) -> None:
        from nemo.utils import logging

        columns = ("prompt", "response", "finish", "tokens", "forwards")
        rows = [(s.prompt, s.response, s.finish_reason, s.response_len, s.num_forwards) for s in samples]
        logging.info(f"Samples after update {step}\n{as_text(columns, rows)}")
        log_table(trainer, "samples", columns, rows, step)


def as_text(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table for a log: long texts are cut, and nothing in them reaches the terminal as a command."""
    table = Table(show_lines=True, width=_WIDTH)
    for name in columns:
        is_text = name in ("prompt", "response")
        table.add_column(name, ratio=(2 if name == "response" else 1) if is_text else None, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_printable(str(value))) for value in row))
    console = Console(file=io.StringIO(), width=_WIDTH)
    console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def _printable(text: str) -> str:
    text = text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
