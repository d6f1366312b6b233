"""Leaving on a signal: the optimizer step is finished, a checkpoint is saved, and the exit code asks for another start.

NeMo's own callback runs on GPUs only, hears the first rank alone, and leaves with 0: a scheduler takes that for the end.
"""

import os
import signal
import subprocess
import threading
from types import FrameType
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from nemo.utils import logging
from typing_extensions import override

#: Exit code of a run that was told to leave: "try again later" (EX_TEMPFAIL of sysexits.h). Slurm queues the job again where its
#: `RequeueExit` names the code, a batch script of NeMo-Run where it is not 0; torchrun makes 1 of it.
EXIT_CODE = 75
#: What a scheduler ends a job with, and what `sbatch --signal=USR1@120` warns it with.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preempted(SystemExit):
    """The run leaves on a signal; its checkpoint is saved on the way out."""

    @classmethod
    def on(cls, trainer: Trainer) -> "Preempted":
        """Leave with `EXIT_CODE`; with 0 where the first process started this one, for it kills itself if one of those fails."""
        environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
        is_started_by_first = isinstance(environment, LightningEnvironment) and environment.local_rank() > 0
        return cls(0 if is_started_by_first else EXIT_CODE)


class Preemption(Callback):
    """Lets all ranks leave together, whichever of them gets a signal: after the optimizer step that is under way.

    A rollout is not waited for. It is a function of weights and seed alone, so it is given up and the run that resumes does it
    again; of several data-parallel ranks those without a signal finish their share. During start-up, when there is nothing to
    save, signals end the process as usual.

    In a Slurm job SIGUSR1 also has the job queued again, as Lightning has it.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._first_step = 0

    @property
    def is_wanted(self) -> bool:
        """Whether this rank got a signal."""
        return self._received is not None

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen in place of Lightning, which would leave each rank by itself or save in the middle of a step."""
        self._first_step = trainer.global_step
        pl_module.gives_up_rollouts = lambda: self.is_wanted  # type: ignore[assignment]
        if trainer.received_sigterm:
            self._received = signal.SIGTERM
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)  # Lightning puts its own back when it tears down

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave after this step if any rank got a signal.

        Raises:
            Preempted: on every rank.
        """
        if trainer.strategy.reduce_boolean_decision(self.is_wanted, all=False):
            raise Preempted.on(trainer)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what the run has done since it started or saved last."""
        if not isinstance(exception, Preempted):
            return
        logging.info(f"Told to leave: the run goes on after step {trainer.global_step} when it is started again.")
        checkpoints = trainer.checkpoint_callback
        saved = (self._first_step, getattr(checkpoints, "_last_global_step_saved", 0))
        if isinstance(checkpoints, ModelCheckpoint) and trainer.global_step not in saved:
            checkpoints._save_last_checkpoint(trainer, checkpoints._monitor_candidates(trainer))
        trainer.strategy.checkpoint_io.teardown()  # a save in the background
        if trainer.is_global_zero and self._received == signal.SIGUSR1 and _is_slurm(trainer):
            _requeue()
        # `srun --kill-on-bad-exit` ends the first rank as soon as another has left.
        trainer.strategy.barrier()


def _is_slurm(trainer: Trainer) -> bool:
    environment = trainer.strategy.cluster_environment  # type: ignore[attr-defined]
    return isinstance(environment, SLURMEnvironment) and environment.auto_requeue


def _requeue() -> None:
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = os.environ["SLURM_JOB_ID"] if array is None else f"{array}_{task}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
        logging.info(f"Slurm job {job} is queued again.")
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "stderr", None) or error
        logging.warning(f"Slurm job {job} could not be queued again ({reason}); the exit code {EXIT_CODE} asks for it.")
