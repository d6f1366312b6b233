"""A training loop that resumes exactly where it was interrupted."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from typing_extensions import override


class ExactResumeLoop(_TrainingEpochLoop):
    """After a restart every validation takes place once, and an epoch has as many batches as without the restart.

    A checkpoint can be saved before or after the validation that is due at its step. Lightning's loop validates again in
    the second case, NeMo's (`exp_manager.disable_validation_on_resume`) leaves out a validation in the first; both train
    one batch too many where the checkpoint is that of an epoch's last batch.

    Attributes:
        validated_step: `global_step` of the last validation.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer, trainer.min_steps, trainer.max_steps)
        self.validated_step = -1

    @override
    def advance(self, data_fetcher: _DataFetcher) -> None:
        if self.restarting:
            if self._should_check_val_fx(data_fetcher) and self.validated_step != self.global_step:
                return  # on_advance_end validates
            if self._is_training_done:
                raise StopIteration
            self._restarting = False
        # What NeMo's callbacks log is labelled with this count. Lightning's lags by one, and once more after every restart.
        self._batches_that_stepped = self.global_step + 1
        super().advance(data_fetcher)

    @override
    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        if self._should_check_val_fx(data_fetcher):
            self.validated_step = self.global_step
        super().on_advance_end(data_fetcher)

    @override
    def on_save_checkpoint(self) -> dict[str, Any]:
        return {**super().on_save_checkpoint(), "validated_step": self.validated_step}

    @override
    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        super().on_load_checkpoint(state_dict)
        self.validated_step = state_dict.get("validated_step", -1)
