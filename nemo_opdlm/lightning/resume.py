"""NeMo's exp_manager for checkpoints that are folders and always whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from nemo_opdlm.lightning.async_checkpoint_io import AsyncCheckpointIO
from nemo_opdlm.lightning.callbacks import MetricsFile
from nemo_opdlm.lightning.loggers import continue_wandb_run
from nemo_opdlm.lightning.loops import ExactResumeLoop
from nemo_opdlm.lightning.trainer_state import load_trainer_state
from nemo_opdlm.megatron import atomic_folder

_UNFINISHED = "-unfinished"


def start_experiment(trainer: Trainer, config: Mapping[str, Any]) -> Path:
    """Call `exp_manager(trainer, config)` such that a run killed at any moment resumes when started again.

    NeMo marks a checkpoint as unfinished while it is saved or removed, and refuses to resume if the last one is marked.
    Ours are whole wherever they are there, so first the marks are brought in line with the folders. The callback that
    writes `metrics.jsonl` and the loop that resumes exactly (instead of `disable_validation_on_resume`) are added.

    Args:
        trainer: without logger and without checkpoint callback.
        config: the `exp_manager` section.

    Returns:
        The log folder.
    """
    from nemo.utils.exp_manager import exp_manager

    folder = checkpoint_directory(config)
    atomic_folder.on_rank_zero(lambda: _tidy(folder))
    if config.get("resume_if_exists"):
        config = continue_wandb_run(config, log_directory(config), is_resumed=any(folder.glob("*last")))
    # The first rank first: it moves the files of an earlier run away, which the others would find half moved.
    log_dir = atomic_folder.on_rank_zero(lambda: exp_manager(trainer, config))
    if not trainer.is_global_zero:
        exp_manager(trainer, config)
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint):
            _name_like_files(callback)
            _save_as_the_strategy_does(trainer, callback)
    trainer.fit_loop.epoch_loop = ExactResumeLoop(trainer)
    # Ahead of the checkpoint callback: no checkpoint is ever newer than the metrics.
    trainer.callbacks.insert(0, MetricsFile(log_dir))  # type: ignore[attr-defined]
    return Path(log_dir)


def _tidy(folder: Path) -> None:
    if folder.is_dir():
        atomic_folder.settle(folder)
        keep_one_last(folder)


def checkpoint_directory(config: Mapping[str, Any]) -> Path:
    """Where exp_manager looks for checkpoints to resume from."""
    params = config.get("checkpoint_callback_params") or {}
    if params.get("dirpath"):
        return Path(params["dirpath"])
    return log_directory(config) / "checkpoints"


def log_directory(config: Mapping[str, Any]) -> Path:
    """Where exp_manager puts a run that resumes if it can."""
    if config.get("explicit_log_dir"):
        return Path(config["explicit_log_dir"])
    base = Path(config.get("exp_dir") or Path.cwd() / "nemo_experiments")
    return base / (config.get("name") or "default") / (config.get("version") or "")


def keep_one_last(directory: Path) -> None:
    """Leave one `*-last` checkpoint for NeMo to find: the newest. The others are marked, and NeMo removes them."""
    lasts = [folder for folder in directory.glob("*last") if folder.is_dir()]
    finished = [folder for folder in lasts if not _mark(folder).exists()]
    candidates = finished or lasts
    if not candidates:
        return
    newest = max(candidates, key=_step)
    for folder in lasts:
        if folder == newest:
            _mark(folder).unlink(missing_ok=True)
        else:
            _mark(folder).touch()


def _mark(folder: Path) -> Path:
    return folder.with_name(folder.name + _UNFINISHED)


def _step(folder: Path) -> tuple[int, float]:
    return int(load_trainer_state(folder)["global_step"]), folder.stat().st_mtime


def _save_as_the_strategy_does(trainer: Trainer, callback: ModelCheckpoint) -> None:
    if isinstance(trainer.strategy.checkpoint_io, AsyncCheckpointIO):
        from nemo_opdlm.lightning.async_model_checkpoint import AsyncModelCheckpoint

        AsyncModelCheckpoint.take_over(callback)


def _name_like_files(callback: ModelCheckpoint) -> None:
    """Give the checkpoints that NeMo found as folders the `.ckpt` names that Lightning compares with.

    Else the checkpoint a run resumed from is never removed, and at the next start NeMo finds two `*-last` and stops.
    """

    def named(path: str) -> str:
        return f"{path}.ckpt" if path and not path.endswith(".ckpt") else path

    callback.last_model_path = named(callback.last_model_path)
    callback.best_model_path = named(callback.best_model_path)
    callback.kth_best_model_path = named(callback.kth_best_model_path)
    callback.best_k_models = {named(path): score for path, score in callback.best_k_models.items()}
