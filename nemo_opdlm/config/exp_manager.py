"""Keys of NeMo's experiment manager, mirrored so that they can be checked before NeMo is imported.

A test compares the names with the installed NeMo's. Defaults are NeMo's but where a comment says otherwise.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class CheckpointCallbackConfig:
    """Keys of `exp_manager.checkpoint_callback_params`."""

    dirpath: str | None = None
    filename: str | None = None
    monitor: str | None = "val_loss"
    mode: Literal["min", "max"] = "min"
    verbose: bool = True
    save_last: bool = True
    save_top_k: int = 3
    save_weights_only: bool = False
    auto_insert_metric_name: bool = True
    # NeMo's 1 contradicts every_n_train_steps in Lightning; null means 1 where nothing else is given.
    every_n_epochs: int | None = None
    every_n_train_steps: int | None = None
    train_time_interval: str | None = None
    prefix: str | None = None
    postfix: str = ".nemo"
    save_best_model: bool = False
    always_save_nemo: bool = False
    save_nemo_on_train_end: bool = True
    model_parallel_size: int | None = None
    save_on_train_epoch_end: bool = False
    async_save: bool = False
    save_last_n_optim_states: int = -1


@dataclass(frozen=True)
class EarlyStoppingConfig:
    """Keys of `exp_manager.early_stopping_callback_params`."""

    monitor: str = "val_loss"
    mode: Literal["min", "max"] = "min"
    min_delta: float = 0.001
    patience: int = 10
    verbose: bool = True
    strict: bool = True
    check_finite: bool = True
    stopping_threshold: float | None = None
    divergence_threshold: float | None = None
    check_on_train_epoch_end: bool | None = None
    log_rank_zero_only: bool = False


@dataclass(frozen=True)
class StepTimingConfig:
    """Keys of `exp_manager.step_timing_kwargs`."""

    reduction: str = "mean"
    sync_cuda: bool = False
    buffer_size: int = 1


@dataclass(frozen=True)
class EMAConfig:
    """Keys of `exp_manager.ema`; it must stay off, NeMo's EMA wraps optimizers other than Megatron's."""

    enable: bool = False
    decay: float = 0.999
    cpu_offload: bool = False
    validate_original_weights: bool = False
    every_n_steps: int = 1


@dataclass(frozen=True)
class ExpManagerConfig:
    """Keys of `exp_manager`.

    Resuming is on by default, unlike NeMo's: running the same command again continues the run.
    `create_preemption_callback` listens to SIGTERM and SIGUSR1, on CPUs too: the run saves after the step under way and exits
    with 75; in a Slurm job SIGUSR1 also has the job queued again. `max_time_per_run` stops after a step, saves, and exits with 0.
    """

    explicit_log_dir: str | None = None
    exp_dir: str | None = None
    name: str | None = None
    version: str | None = None
    use_datetime_version: bool = True
    resume_if_exists: bool = True
    resume_past_end: bool = False
    resume_ignore_no_checkpoint: bool = True
    resume_from_checkpoint: str | None = None
    create_tensorboard_logger: bool = True
    summary_writer_kwargs: dict[str, Any] | None = None
    create_wandb_logger: bool = False
    wandb_logger_kwargs: dict[str, Any] | None = None
    create_mlflow_logger: bool = False
    mlflow_logger_kwargs: dict[str, Any] | None = None
    create_dllogger_logger: bool = False
    dllogger_logger_kwargs: dict[str, Any] | None = None
    create_clearml_logger: bool = False
    clearml_logger_kwargs: dict[str, Any] | None = None
    create_neptune_logger: bool = False
    neptune_logger_kwargs: dict[str, Any] | None = None
    create_checkpoint_callback: bool = True
    checkpoint_callback_params: CheckpointCallbackConfig = field(default_factory=CheckpointCallbackConfig)
    create_early_stopping_callback: bool = False
    early_stopping_callback_params: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    create_preemption_callback: bool = True
    files_to_copy: tuple[str, ...] | None = None
    log_step_timing: bool = True
    log_delta_step_timing: bool = False
    step_timing_kwargs: StepTimingConfig = field(default_factory=StepTimingConfig)
    disable_validation_on_resume: bool = True
    ema: EMAConfig = field(default_factory=EMAConfig)
    max_time_per_run: str | None = None
    seconds_to_sleep: float = 5
    create_straggler_detection_callback: bool = False
    straggler_detection_params: dict[str, Any] | None = None
    create_fault_tolerance_callback: bool = False
    fault_tolerance: dict[str, Any] | None = None
    # NeMo's True estimates FLOPs for architectures it knows by class; ours is none of them.
    log_tflops_per_sec_per_gpu: bool = False
