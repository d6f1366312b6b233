"""Lightning's strategy for a model that Megatron has already distributed."""

import time
from collections.abc import Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch.distributed as dist
from lightning.fabric.utilities.distributed import _init_dist_connection
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer
from typing_extensions import override

from nemo_opdlm.lightning.async_checkpoint_io import AsyncCheckpointIO
from nemo_opdlm.lightning.checkpoint_io import SHARDED_STATE, MegatronCheckpointIO
from nemo_opdlm.megatron import parallel
from nemo_opdlm.megatron.parallel import ParallelContext

_HAS_OPTIMIZER = "has_optimizer"
_LOGGED = "callback_metrics"


class ShardedModule(Protocol):
    """What a LightningModule offers so that this strategy can save and load it.

    Attributes:
        vocab_size: true rows of the vocabulary; embedding and head may be padded to more.
    """

    vocab_size: int

    def sharded_state_dict(self, include_optimizer: bool, is_loading: bool = False) -> dict[str, Any]:
        """Megatron's sharded state dict: `{"model": ...}` with keys `model.*`, and `"optimizer"` where asked for."""
        ...

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Take over a loaded state; where it has no `"optimizer"`, fp32 master weights are copied from the weights."""
        ...


class MegatronPrecision(Precision):
    """Remembers `trainer.precision` and does nothing: the model holds its own dtypes and enters autocast itself."""

    def __init__(self, precision: str) -> None:
        self.precision = precision  # type: ignore[assignment]


class MegatronStrategy(DDPStrategy):
    """One process per device: Megatron does gradients, optimizer and layout; Lightning does the loop and logging.

    The model is neither wrapped nor broadcast, and no autocast is added. Checkpoints are folders
    (`MegatronCheckpointIO`).

    Args:
        tensor_model_parallel_size: Megatron's TP.
        pipeline_model_parallel_size: Megatron's PP.
        virtual_pipeline_model_parallel_size: model chunks per stage, or None.
        context_parallel_size: Megatron's CP.
        seed: of Megatron's random states.
        timeout_minutes: of collective operations.
        async_save: write checkpoints while training goes on (`AsyncCheckpointIO`).

    Attributes:
        parallel: this process's place in the layout, once `setup_environment` has run.
    """

    def __init__(
        self,
        tensor_model_parallel_size: int = 1,
        pipeline_model_parallel_size: int = 1,
        virtual_pipeline_model_parallel_size: int | None = None,
        context_parallel_size: int = 1,
        seed: int = 1234,
        timeout_minutes: float = 30,
        async_save: bool = False,
    ) -> None:
        checkpoint_io = AsyncCheckpointIO() if async_save else MegatronCheckpointIO()
        super().__init__(checkpoint_io=checkpoint_io, timeout=timedelta(minutes=timeout_minutes))
        self.parallel: ParallelContext | None = None
        self._checkpoint_seconds = 0.0
        self._initialize = partial(
            parallel.initialize,
            tensor_model_parallel_size=tensor_model_parallel_size,
            pipeline_model_parallel_size=pipeline_model_parallel_size,
            virtual_pipeline_model_parallel_size=virtual_pipeline_model_parallel_size,
            context_parallel_size=context_parallel_size,
            seed=seed,
            timeout_minutes=timeout_minutes,
        )

    # -- processes --

    def start(self, trainer: Trainer) -> ParallelContext:
        """Start the processes and build Megatron's groups before `fit` does, so that a model can be built first."""

        def nothing() -> None: ...

        if self.parallel is None:
            if self.launcher is not None:
                self.launcher.launch(nothing, trainer=trainer)
            self.setup_environment()
        assert self.parallel is not None
        return self.parallel

    @override
    def setup_distributed(self) -> None:
        reset_seed()
        self.set_world_ranks()
        assert self.cluster_environment is not None
        if self.cluster_environment.world_size() > 1 and not dist.is_initialized():
            # A launcher has set the address; one process alone gets a file store instead (parallel.initialize).
            _init_dist_connection(self.cluster_environment, self._get_process_group_backend(), timeout=self._timeout)
        self.parallel = self._initialize(local_rank=self.local_rank)
        _tell_nemo(self.parallel)

    @property
    @override
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        assert self.parallel is not None
        return {"num_replicas": self.parallel.dp_size, "rank": self.parallel.dp_rank}

    # -- model --

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model_to_device()
        if trainer.state.fn == TrainerFn.FITTING:
            self.setup_optimizers(trainer)
        self.setup_precision_plugin()

    @override
    def teardown(self) -> None:
        # Lightning would move the model to the CPU here, away from Megatron's gradient buffers.
        assert self.accelerator is not None and self.cluster_environment is not None
        self.cluster_environment.teardown()
        self.precision_plugin.teardown()
        self.accelerator.teardown()
        self.checkpoint_io.teardown()

    @property
    @override
    def precision_plugin(self) -> Precision:
        return self._precision_plugin if self._precision_plugin is not None else MegatronPrecision("32-true")

    @precision_plugin.setter
    @override
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        # Lightning chooses a plugin by `trainer.precision`: its name is kept, its autocast and casts are not.
        self._precision_plugin = None if precision_plugin is None else MegatronPrecision(precision_plugin.precision)

    # -- checkpoints --

    @property
    @override
    def restore_checkpoint_after_setup(self) -> bool:
        return True

    @property
    @override
    def lightning_restore_optimizer(self) -> bool:
        return False

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return {}

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Any, storage_options: Mapping[str, Any] | None = None
    ) -> None:
        """Write a checkpoint folder; every rank calls this.

        Args:
            checkpoint: what `Trainer.save_checkpoint` collected.
            filepath: its name, with or without `.ckpt`.
            storage_options: `include_optimizer: False` leaves the optimizer out; the rest is the checkpoint IO's.
        """
        start = time.perf_counter()
        state = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "hparams_type")}
        # Before the first step there are no moments: Megatron cannot load an optimizer without them.
        include_optimizer = (
            bool(state.pop("optimizer_states", []))
            and checkpoint["global_step"] > 0
            and (storage_options or {}).get("include_optimizer", True)
        )
        state[_HAS_OPTIMIZER] = include_optimizer
        state["loops"] = _count_finished_batch(state["loops"])
        # Else a resumed run would know no val_loss, and name its checkpoints val_loss=0, until it validates again.
        state[_LOGGED] = dict(self._trainer.callback_metrics)
        state[SHARDED_STATE] = self._sharded_module.sharded_state_dict(include_optimizer)
        self.checkpoint_io.save_checkpoint(state, filepath, storage_options)
        self._checkpoint_seconds += time.perf_counter() - start

    def take_checkpoint_seconds(self) -> float:
        """How long training stood still for checkpoints since this was last asked."""
        seconds, self._checkpoint_seconds = self._checkpoint_seconds, 0.0
        return seconds

    @override
    def load_checkpoint(self, checkpoint_path: str | Any, load_optimizer_states: bool = True) -> dict[str, Any]:
        """Read a checkpoint folder of any layout; every rank calls this.

        Raises:
            ValueError: the checkpoint is missing, damaged, unsafe or of another model; one line that names the file.
        """
        assert isinstance(self.checkpoint_io, MegatronCheckpointIO)
        checkpoint = self.checkpoint_io.load_checkpoint(checkpoint_path)
        fitting = self._trainer.state.fn == TrainerFn.FITTING
        include_optimizer = load_optimizer_states and fitting and checkpoint[_HAS_OPTIMIZER]
        module = self._sharded_module
        wanted = module.sharded_state_dict(include_optimizer, is_loading=True)
        checkpoint[SHARDED_STATE] = self.checkpoint_io.load_sharded(checkpoint_path, wanted, module.vocab_size)
        return checkpoint

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        self._sharded_module.load_sharded_state(checkpoint[SHARDED_STATE])
        self._trainer.callback_metrics.update(checkpoint[_LOGGED])

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing to do: weights and optimizer were loaded together."""

    @property
    def _trainer(self) -> Trainer:
        assert self.lightning_module is not None
        return self.lightning_module.trainer

    @property
    def _sharded_module(self) -> ShardedModule:
        assert isinstance(self.lightning_module, LightningModule)
        return self.lightning_module  # type: ignore[return-value]


def _count_finished_batch(loops: dict[str, Any]) -> dict[str, Any]:
    """Count the batch at whose end a checkpoint is saved as completed; one that was given up is not the last of its epoch.

    Callbacks run before Lightning counts it. A resumed run would count it twice, and every validation after it would
    come one step late.
    """
    fit_loop = dict(loops["fit_loop"])
    progress = fit_loop["epoch_loop.batch_progress"]
    fit_loop["epoch_loop.batch_progress"] = {
        **{key: dict.fromkeys(progress[key], progress[key]["processed"]) for key in ("total", "current")},
        "is_last_batch": progress["is_last_batch"] and progress["current"]["processed"] == progress["current"]["ready"],
    }
    return {**loops, "fit_loop": fit_loop}


def _tell_nemo(context: ParallelContext) -> None:
    """Fill NeMo's global state: without it ModelPT saves on rank 0 only, and a collective save would wait forever."""
    from nemo.utils.app_state import AppState  # takes 10 s at the top of a script that does not train

    state = AppState()
    state.world_size, state.global_rank = dist.get_world_size(), dist.get_rank()
    state.model_parallel_size = context.tp_size * context.pp_size
    state.tensor_model_parallel_size, state.tensor_model_parallel_rank = context.tp_size, context.tp_rank
    state.pipeline_model_parallel_size, state.pipeline_model_parallel_rank = context.pp_size, context.pp_rank
    state.context_parallel_size = context.cp_size
    state.data_parallel_size, state.data_parallel_rank = context.dp_size, context.dp_rank
