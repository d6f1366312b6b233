"""``OPDLMModel``: the composition root. NeMo and Lightning drive it, ``distiller.py`` does the method."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from nemo.core.classes import ModelPT
from nemo.utils import logging
from omegaconf import DictConfig, open_dict
from torch.utils.data import DataLoader, Dataset

from nemo_opdlm.config import Architecture, ModelConfig
from nemo_opdlm.convert.hf_folder import read_tokenizer_files
from nemo_opdlm.data.collate import collate
from nemo_opdlm.data.prompts import PromptDataset
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.settings import RolloutProgress
from nemo_opdlm.lightning.loggers import NEMO_NAMES
from nemo_opdlm.lightning.optimizer import MegatronOptimizerHandle
from nemo_opdlm.lightning.preemption import Preempted
from nemo_opdlm.lightning.samples import Sample
from nemo_opdlm.megatron import optimizer as megatron_optimizer
from nemo_opdlm.megatron import tensor_overlap
from nemo_opdlm.megatron.effective import effective_settings
from nemo_opdlm.megatron.flight import RolloutGivenUp
from nemo_opdlm.megatron.parallel import ParallelContext, initialize
from nemo_opdlm.megatron.student import build_model
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.models.archive import OPDLMSaveRestoreConnector
from nemo_opdlm.models.conversion import PREFIX
from nemo_opdlm.models.distiller import Metrics, OnPolicyDistiller
from nemo_opdlm.models.heldout import HeldoutSet
from nemo_opdlm.models.method import Method, SpecialTokens
from nemo_opdlm.models.peak_flops import peak_tflops
from nemo_opdlm.models.precision import precision_name
from nemo_opdlm.models.samples import read_samples, tokenizer_of
from nemo_opdlm.models.settings import (
    HELDOUT_SAMPLING,
    heldout_settings,
    model_options,
    model_section,
    optimizer_settings,
)
from nemo_opdlm.models.throughput import Throughput


class _Updates(Dataset[int]):
    """The training loader's clock: item k stands for one update. What an update does follows from ``global_step``."""

    def __init__(self, num_updates: int) -> None:
        self.num_updates = num_updates

    def __len__(self) -> int:
        return self.num_updates

    def __getitem__(self, index: int) -> int:
        return index


class OPDLMModel(ModelPT):
    """A block-diffusion student distilled on-policy from the AR model it came from.

    The network is Megatron's; the frozen teacher lives outside the module tree and is in no checkpoint.

    Args:
        cfg: the ``model`` section: architecture, layout, method, optimizer, data.
        trainer: Lightning's trainer, None for inference.

    Raises:
        ValueError: the section has unknown, missing or contradictory keys.
    """

    def __init__(self, cfg: DictConfig, trainer: Trainer | None = None) -> None:
        super().__init__(cfg=cfg, trainer=trainer)
        self._save_restore_connector = OPDLMSaveRestoreConnector()
        self.automatic_optimization = False
        self.config: ModelConfig
        self.arch: Architecture
        self.config, self.arch, precision = model_section(cfg)
        self.parallel: ParallelContext = initialize(
            self.config.tensor_model_parallel_size,
            self.config.pipeline_model_parallel_size,
            self.config.virtual_pipeline_model_parallel_size,
            self.config.context_parallel_size,
            self.config.seed,
        )
        self.options = model_options(self.config, precision)
        with open_dict(self.cfg):
            # What an archive says is how its weights are stored, not under which autocast they were trained.
            self.cfg.precision = precision_name(self.options.params_dtype)
            self._clip_grad = self.cfg.pop("gradient_clip_val", None)
        self.model = build_model(self.arch, self.parallel, AttentionRule.BLOCK_DIFFUSION, self.options)
        folder = self.config.tokenizer.type
        #: Name -> content, for the archive.
        self.tokenizer_files = {} if folder is None else read_tokenizer_files(Path(folder))
        self._tokenizer: Any = None
        self.tokens: SpecialTokens | None = None
        self.step_metrics: Metrics = {}
        #: Whoever wants to be told how far a rollout is, and which part of a step begins.
        self.rollout_progress: Callable[[RolloutProgress], None] | None = None
        self.phase_began: Callable[[str], None] | None = None
        #: Whoever may want a rollout to be given up.
        self.gives_up_rollouts: Callable[[], bool] | None = None
        # A tuple hides the teacher from nn.Module, and so from every state dict and checkpoint.
        self._unregistered: tuple[Any, ...] = ()
        self._train_prompts: PromptDataset | None = None
        self._heldout_prompts: PromptDataset | None = None
        self._heldout: HeldoutSet | None = None

    @classmethod
    def from_config_dict(cls, config: DictConfig, trainer: Trainer | None = None) -> "OPDLMModel":
        """Build from a config; NeMo's default would look the class up in a list that plugins cannot enter."""
        return cls(cfg=config, trainer=trainer)

    @classmethod
    def restore_from(cls, *args: Any, save_restore_connector: Any = None, **kwargs: Any) -> "OPDLMModel":
        """Restore from a ``.nemo`` archive or an extracted one; see ``OPDLMSaveRestoreConnector.restore_from``."""
        connector = save_restore_connector or OPDLMSaveRestoreConnector()
        return super().restore_from(*args, save_restore_connector=connector, **kwargs)  # type: ignore[no-any-return]

    @classmethod
    def list_available_models(cls) -> list[Any]:
        """No pretrained models are published."""
        return []

    def use_prompts(self, tokens: SpecialTokens, train: PromptDataset | None, heldout: PromptDataset | None) -> None:
        """Hand over the prompts, tokenised and checked at set-up."""
        self.tokens, self._train_prompts, self._heldout_prompts = tokens, train, heldout

    @property
    def heldout_prompts(self) -> PromptDataset:
        """The held-out prompts of ``use_prompts``."""
        assert self._heldout_prompts is not None, "no held-out prompts: set model.data.validation_ds.file_path"
        return self._heldout_prompts

    @property
    def heldout_requests(self) -> Requests:
        """The held-out prompts that are answered, and how long the answers may be."""
        validation, prompts = self.config.data.validation_ds, self.heldout_prompts
        count = min(validation.num_samples, len(prompts))
        prompt_ids, prompt_len = collate([prompts[i] for i in range(count)], self.method.pad_id)
        limits = torch.full_like(prompt_len, validation.response_length)
        return Requests(prompt_ids, prompt_len, limits, torch.arange(count)).to(self.parallel.device)

    @property
    def method(self) -> Method:
        """The method's settings for this run."""
        assert self.tokens is not None
        max_steps = self._trainer.max_steps if self._trainer is not None else 1
        return Method.of(self.config, self.tokens, self.arch.max_position_embeddings, max_steps)

    def use_teacher(self, teacher: Teacher | None) -> None:
        """Hand over the frozen teacher; None where ``nll`` trains on responses that are not the teacher's."""
        self._unregistered = (teacher,)

    @property
    def teacher(self) -> Teacher | None:
        """The frozen AR model, while training."""
        return self._unregistered[0] if self._unregistered else None

    @property
    def distiller(self) -> OnPolicyDistiller:
        """The method, between ``setup`` and the end of training."""
        distiller: OnPolicyDistiller = self._unregistered[1]
        return distiller

    def setup(self, stage: str | None = None) -> None:
        """Wrap the student for training; Lightning calls it before ``configure_optimizers``."""
        if stage != "fit":
            return
        assert self.tokens is not None and self._train_prompts is not None
        settings = optimizer_settings(self.config, self.trainer.max_steps, self._clip_grad)
        network = megatron_optimizer.wrap(self.model, settings)
        self._optimizer = megatron_optimizer.StudentOptimizer(network, settings)
        method = self.method
        distiller = OnPolicyDistiller(
            self.config,
            method,
            network,
            self._optimizer,
            self.teacher,
            self._train_prompts,
            step=lambda loss: self.optimizers().step(loss=loss),
            on_progress=self._tell_progress,
            on_phase=self._tell_phase,
            gives_up=self._gives_up,
        )
        self._unregistered = (self.teacher, distiller)
        if self.model.config.tp_comm_overlap:
            tensor_overlap.start(self.model.config, self.parallel, distiller.split.num_columns)
        self._throughput = Throughput(
            self.config,
            self.arch,
            None if self.teacher is None else self.teacher.network.arch,
            self.trainer.world_size,
            peak_tflops(self.config.device_peak_tflops, self.parallel.device, self.trainer.precision),
        )
        self.setup_training_data(self.cfg.data.train_ds)
        if self._heldout_prompts is not None:
            self.setup_validation_data(self.cfg.data.validation_ds)
        logging.info(f"Divergence: {method.divergence.formula}")
        logging.info(effective_settings(self._optimizer, self.teacher))

    def _tell_progress(self, progress: RolloutProgress) -> None:
        if self.rollout_progress is not None:
            self.rollout_progress(progress)

    def _tell_phase(self, name: str) -> None:
        if self.phase_began is not None:
            self.phase_began(name)

    def _gives_up(self) -> bool:
        return self.gives_up_rollouts is not None and self.gives_up_rollouts()

    def setup_training_data(self, train_data_config: DictConfig) -> None:
        """One item per update of an epoch over the training prompts."""
        schedule = self.distiller.schedule
        updates = schedule.steps_per_epoch * self.distiller.updates_per_rollout
        self._train_dl = DataLoader(_Updates(updates), batch_size=None)

    def setup_validation_data(self, val_data_config: DictConfig) -> None:
        """The held-out set counts as one batch."""
        self._validation_dl = DataLoader(_Updates(1), batch_size=None)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Megatron's optimizer, as Lightning wants to see it."""
        return MegatronOptimizerHandle(self._optimizer.megatron.param_groups, self._optimizer.step)

    def on_train_start(self) -> None:
        """A run that has trained enough tokens makes no update when it is started again."""
        super().on_train_start()
        self._stop_at_enough_tokens()

    def _stop_at_enough_tokens(self) -> None:
        limit, trained = self.config.opdlm.max_trained_tokens, self.distiller.num_trained_tokens
        if limit is not None and trained >= limit:
            logging.info(f"The run ends after {trained} trained tokens: model.opdlm.max_trained_tokens={limit}.")
            self.trainer.should_stop = True

    def training_step(self, batch: int, batch_idx: int) -> None:
        """One update (``OnPolicyDistiller.update``)."""
        global_step, start = self.global_step, time.perf_counter()
        try:
            metrics = self.distiller.update(global_step)
        except RolloutGivenUp:
            raise Preempted.on(self.trainer) from None
        assert self.distiller.batch is not None
        index = global_step % self.config.updates_per_epoch
        seconds = time.perf_counter() - start
        metrics |= self._throughput.metrics(self.distiller.batch, index, metrics, seconds)
        self.step_metrics = metrics
        same = {theirs: metrics[ours] for ours, theirs in NEMO_NAMES.items()}
        # For checkpoints and early stopping to monitor; MetricsFile writes them to the loggers.
        self.log_dict({**metrics, **same}, batch_size=1, logger=False)
        self._stop_at_enough_tokens()

    def samples(self, count: int) -> list[Sample]:
        """The first rollouts of the batch that the last update trained on, as text."""
        batch = self.distiller.batch
        assert batch is not None
        if self._tokenizer is None:
            self._tokenizer = tokenizer_of(self.config.tokenizer, self.tokenizer_files)
        return read_samples(batch.trajectory, batch.rollout_step, count, self._tokenizer)

    def validation_step(self, batch: int, batch_idx: int) -> None:
        """``val_loss``: the held-out divergence."""
        self._optimizer.network.finish_param_sync()
        heldout = self.heldout
        self._tell_phase("validation")
        value = heldout.divergence(self.model, self.config.data.validation_ds.num_samples)
        self.log("val_loss", value, batch_size=1, logger=False)

    @property
    def heldout(self) -> HeldoutSet:
        """The fixed held-out set, built when it is first asked for."""
        if self._heldout is None:
            self._heldout = self._build_heldout()
        return self._heldout

    def _build_heldout(self) -> HeldoutSet:
        assert self.teacher is not None
        self._tell_phase("held-out answers")
        requests = self.heldout_requests
        return HeldoutSet.build(
            self.teacher,
            self.method.engine(self.teacher.network, len(requests), HELDOUT_SAMPLING),
            requests,
            heldout_settings(self.method),
            self._tell_progress,
        )

    def on_train_end(self) -> None:
        """Leave every rank with the newest weights."""
        self._optimizer.network.finish_param_sync()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is not a sharded tensor: the unfinished rollout batch and the schedule."""
        checkpoint["opdlm"] = self.distiller.state_dict()
        checkpoint["device_hours"] = self._throughput.device_hours
        checkpoint["lr_scheduler"] = self._optimizer.scheduler.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the schedule and continue the unfinished rollout batch; the strategy loads checkpoints after ``setup``."""
        self._optimizer.scheduler.load_state_dict(checkpoint["lr_scheduler"])
        self.distiller.load_state_dict(checkpoint["opdlm"])
        self._throughput.device_hours = checkpoint.get("device_hours", 0.0)

    @property
    def vocab_size(self) -> int:
        """True rows of the vocabulary, before padding."""
        return self.arch.vocab_size

    def sharded_state_dict(self, include_optimizer: bool, is_loading: bool = False) -> dict[str, Any]:
        """Megatron's sharded view of the weights (keys ``model.*``) and, for training, of the optimizer."""
        if self._optimizer is not None:
            self._optimizer.network.finish_param_sync()
        weights = self.model.sharded_weights(PREFIX)
        state = {"model": weights}
        if include_optimizer:
            state["optimizer"] = self._optimizer.sharded_state_dict(weights, is_loading)
        return state

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Take over a loaded state; without an optimizer the fp32 master weights follow the weights."""
        self.model.load_weights(state["model"], PREFIX)
        if self._optimizer is None:
            return
        if "optimizer" in state:
            self._optimizer.load_state_dict(state["optimizer"])
        else:
            self._optimizer.megatron.reload_model_params()
