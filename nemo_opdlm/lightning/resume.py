"""NeMo's exp_manager for checkpoints that are folders and always whole."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from nemo_opdlm.lightning.async_checkpoint_io import AsyncCheckpointIO
from nemo_opdlm.lightning.callbacks import MetricsFile
from nemo_opdlm.lightning.loggers import continue_wandb_run
from nemo_opdlm.lightning.loops import ExactResumeFitLoop
from nemo_opdlm.lightning.preemption import Preemption
from nemo_opdlm.lightning.trainer_state import load_trainer_state
from nemo_opdlm.megatron import atomic_folder

_UNFINISHED = "-unfinished"


def start_experiment(trainer: Trainer, config: Mapping[str, Any]) -> Path:
    """Call `exp_manager(trainer, config)` such that a run killed at any moment resumes when started again.

    NeMo marks a checkpoint as unfinished while it is saved or removed, and refuses to resume if the last one is marked.
    Ours are whole wherever they are there, so first the marks are brought in line with the folders. The callback that
    writes `metrics.jsonl`, the one that leaves on a signal (for `create_preemption_callback`) and the loop that resumes exactly
    (instead of `disable_validation_on_resume`) are ours instead of NeMo's.

    Args:
        trainer: without logger and without checkpoint callback.
        config: the `exp_manager` section.

    Returns:
        The log folder.
    """
    from nemo.utils.exp_manager import exp_manager

    folder, is_preemptible = checkpoint_directory(config), config.get("create_preemption_callback", True)
    config = {**config, "create_preemption_callback": False}
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
            # A step made again after a kill replaces what the killed run saved of it, whole and at once, instead of getting a
            # second checkpoint beside the first.
            callback._enable_version_counter = False
            _save_as_the_strategy_does(trainer, callback)
    trainer.fit_loop = ExactResumeFitLoop(trainer)
    # Ahead of the checkpoint callback: no checkpoint is ever newer than the metrics.
    trainer.callbacks.insert(0, MetricsFile(log_dir))  # type: ignore[attr-defined]
    if is_preemptible:
        # Behind it: what is saved at a step anyway is saved first.
        trainer.callbacks.append(Preemption())  # type: ignore[attr-defined]
    return Path(log_dir)


def finish_experiment(trainer: Trainer, module: LightningModule) -> None:
    """Do at the end of `fit` what a run killed between its last checkpoint and its `.nemo` file has left undone.

    The run that resumes it has no step to make, and Lightning tells no callback of its end.
    """
    callback = trainer.checkpoint_callback
    if not isinstance(callback, ModelCheckpoint) or trainer.global_step < trainer.max_steps:
        return
    if atomic_folder.on_rank_zero(lambda: _lacks_archive(callback)):
        callback.on_train_end(trainer, module)


def _lacks_archive(callback: ModelCheckpoint) -> bool:
    """Whether there is no `.nemo` file, or one from before the last checkpoint."""
    if not getattr(callback, "save_nemo_on_train_end", False):
        return False
    archive, last = Path(callback._format_nemo_checkpoint_name()), callback.last_model_path.removesuffix(".ckpt")  # type: ignore[attr-defined]
    if not archive.exists():
        return True
    return bool(last) and archive.stat().st_mtime < Path(last).stat().st_mtime


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
