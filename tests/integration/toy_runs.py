"""Training runs of the toy model under NeMo's exp_manager, and what they leave behind."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from omegaconf import DictConfig, OmegaConf

from nemo_opdlm.lightning.resume import start_experiment
from tests.integration.toy_model import Killed, ToyModel, make_model, make_trainer


def experiment(folder: Path, tensorboard: bool = False, **changes: Any) -> DictConfig:
    checkpoints = {
        "monitor": "val_loss",
        "save_top_k": 2,
        "filename": "toy--{val_loss:.4f}-{step}",
        "save_nemo_on_train_end": False,
        **changes,
    }
    return OmegaConf.create(
        {
            "explicit_log_dir": str(folder),
            "resume_if_exists": True,
            "resume_ignore_no_checkpoint": True,
            "create_tensorboard_logger": tensorboard,
            "log_step_timing": False,
            "seconds_to_sleep": 0,
            "checkpoint_callback_params": checkpoints,
        }
    )


def fit(
    folder: Path,
    max_steps: int,
    *,
    killed_before: int | None = None,
    updates_per_epoch: int = 1000,
    async_save: bool = False,
    callbacks: list[Callback] | None = None,
    trainer_changes: dict[str, Any] | None = None,
    **changes: Any,
) -> ToyModel:
    """Start the same command (again)."""
    model = make_model(stop_before_step=killed_before, updates_per_epoch=updates_per_epoch)
    trainer = make_trainer(max_steps, async_save=async_save, callbacks=callbacks or [], **(trainer_changes or {}))
    start_experiment(trainer, experiment(folder, **changes))
    if killed_before is None:
        trainer.fit(model)
        assert trainer.global_step == max_steps
    else:
        with pytest.raises(Killed):
            trainer.fit(model)
    return model


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def last_steps(folder: Path) -> list[str]:
    return [name.split("step=")[1] for name in checkpoints(folder) if name.endswith("-last")]
