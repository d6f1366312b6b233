"""exp_manager's loggers: TensorBoard and Weights & Biases get what the log folder's files get, at the same steps."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

#: NeMo's dashboards know these metrics by names of their own.
NEMO_NAMES = {"train/loss": "reduced_train_loss", "train/lr": "lr", "train/grad_norm": "grad_norm"}


def log_scalars(trainer: Trainer, metrics: Mapping[str, float], step: int) -> None:
    """Give numbers to every logger, and have them written."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step)
        # A killed run has then told no less than its metrics.jsonl.
        logger.save()


def log_table(trainer: Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    """Give a table to the loggers that show one."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, _markdown(columns, rows), step)
            logger.save()
        elif isinstance(logger, WandbLogger):
            logger.log_table(name, list(columns), [list(row) for row in rows], step=step)


def forget_after(trainer: Trainer, step: int) -> None:
    """Tell TensorBoard that the run goes on behind this step: what a killed process logged later did not happen.

    Weights & Biases cannot take anything back: there the steps since the checkpoint stand twice.
    """
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            # The event that torch's `SummaryWriter(purge_step=...)` begins with; here the step is known only later.
            start = SessionLog(status=SessionLog.START)
            logger.experiment.file_writer.add_event(Event(step=step + 1, file_version="brain.Event:2"))
            logger.experiment.file_writer.add_event(Event(step=step + 1, session_log=start))


def continue_wandb_run(config: Mapping[str, Any], log_dir: Path, is_resumed: bool) -> dict[str, Any]:
    """The `exp_manager` section such that a resumed run goes on in its Weights & Biases run, and keeps it in its log folder.

    What the user gives as `id` or `save_dir` stays.
    """
    section = dict(config)
    if not section.get("create_wandb_logger"):
        return section
    settings: dict[str, Any] = {"save_dir": str(log_dir), **(section.get("wandb_logger_kwargs") or {})}
    # Folders are called [offline-]run-<date>_<time>-<id>.
    runs = sorted(Path(settings["save_dir"]).glob("wandb/*run-*-*"), key=lambda run: run.name.split("run-")[-1])
    if is_resumed and runs and "id" not in settings:
        settings["id"] = runs[-1].name.rpartition("-")[-1]
    return {**section, "wandb_logger_kwargs": settings}


@contextmanager
def finished_loggers(trainer: Trainer) -> Iterator[None]:
    """End the Weights & Biases run with the block: the next run of this process would go on in it."""
    exit_code = 1
    try:
        yield
        exit_code = 0
    finally:
        if trainer.is_global_zero and any(isinstance(logger, WandbLogger) for logger in trainer.loggers):
            import wandb

            wandb.finish(exit_code)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(value) for value in line) + " |" for line in lines)


def _cell(value: Any) -> str:
    text = str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")
    return text.replace("\r", "").replace("\n", "<br>")
