"""NeMo's checkpoint callback for saves that are finished steps after they were begun."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from nemo.utils import logging
from nemo.utils.callbacks import NeMoModelCheckpoint
from typing_extensions import override

from nemo_opdlm.lightning.async_checkpoint_io import FINALIZE, AsyncCheckpointIO
from nemo_opdlm.lightning.preemption import Preempted


class AsyncModelCheckpoint(NeMoModelCheckpoint):
    """Begins saves and finishes them at the next step for which they are ready.

    NeMo's own hooks for that are used: when a checkpoint is in place, its `-unfinished` mark goes, loggers are told, and
    the checkpoints that it replaces are removed, in this order. Only NeMo's check for its own checkpoint IO, which does
    not run with this Megatron-core, is left out.
    """

    @classmethod
    def take_over(cls, callback: NeMoModelCheckpoint) -> None:
        """Turn the callback that exp_manager built into one of this class: others hold it, it cannot be replaced."""
        callback.__class__ = cls
        # NeMo's switch: removing checkpoints waits for the save that replaces them.
        callback.async_save = True

    @property
    @override
    def state_key(self) -> str:
        # It holds the class's name; a run may go on with the other kind of saves.
        return super().state_key.replace(type(self).__qualname__, NeMoModelCheckpoint.__qualname__, 1)  # type: ignore[no-any-return]

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Finish the saves that are ready."""
        _checkpoint_io(trainer).poll()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish all saves, the last one too."""
        super().on_train_end(trainer, pl_module)
        _checkpoint_io(trainer).wait()

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Finish the saves begun, if all ranks are here to do so.

        After an error on one of several ranks the others may wait somewhere else; then the checkpoints before stay the
        last ones. `Preempted` is raised on all ranks at once.
        """
        checkpoint_io = _checkpoint_io(trainer)
        if trainer.world_size > 1 and not isinstance(exception, Preempted):
            checkpoint_io.give_up()
            return
        try:
            checkpoint_io.wait()
        except OSError as error:
            logging.error(f"{error}")

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.set_checkpoint_unfinished_marker(filepath, barrier_after=True)
        finalize = self._get_finalize_save_checkpoint_callback(trainer, filepath, trainer.global_step)
        # To be filled by the removals that follow; `finalize` works it off.
        self.deferred_ckpts_to_remove.append([])
        trainer.save_checkpoint(filepath, self.save_weights_only, storage_options={FINALIZE: finalize})
        logging.info(f"Checkpoint of step {trainer.global_step} is written to {filepath} while training goes on.")
        # As after a save that waits: hooks that follow at this step must not save it again.
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath


def _checkpoint_io(trainer: Trainer) -> AsyncCheckpointIO:
    checkpoint_io = trainer.strategy.checkpoint_io
    assert isinstance(checkpoint_io, AsyncCheckpointIO)
    return checkpoint_io
