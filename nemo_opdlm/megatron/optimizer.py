"""Megatron's DDP, optimizer and learning-rate schedule around the student."""

import logging
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemo_opdlm.megatron.cpu import wants_cpu
from nemo_opdlm.megatron.head import LMHead
from nemo_opdlm.megatron.network import Network
from nemo_opdlm.megatron.student import StagedGPT

#: NeMo's scheduler names -> Megatron's decay styles.
DECAY_STYLES = {
    "CosineAnnealing": "cosine",
    "PolynomialDecayAnnealing": "linear",
    "InverseSquareRootAnnealing": "inverse-square-root",
    "WarmupHoldPolicy": "constant",
    "WarmupAnnealing": "linear",
}
#: How a distributed optimizer is saved: one whole tensor per parameter and moment, which any layout can load.
_SHARDING = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW and its schedule, counted in optimizer steps (cosine: lr(k) = lr k / warm-up, then half a cosine to min_lr)."""

    lr: float
    min_lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    clip_grad: float
    decoupled_weight_decay: bool
    distributed: bool
    decay_style: str
    warmup_steps: int
    decay_steps: int
    overlap_grad_sync: bool = False
    overlap_param_sync: bool = False
    fp8_recipe: str | None = None
    fp8_params: bool = False


def wrap(model: StagedGPT, settings: OptimizerSettings) -> Network:
    """Put the student into Megatron's DDP (fp32 gradient buffers, summed over data- and context-parallel ranks)."""
    distributed = settings.distributed and not wants_cpu()
    if settings.distributed and not distributed and dist.get_rank() == 0:
        level = logging.WARNING if model.parallel.data_size > 1 else logging.INFO
        name = "model.optim.name=distributed_fused_adam"
        logger.log(level, "%s: no GPU, every rank keeps the whole optimizer state", name)
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=settings.overlap_grad_sync,
        overlap_param_gather=settings.overlap_param_sync and distributed,
        use_distributed_optimizer=distributed,
        fp8_param_gather=settings.fp8_params,
        check_for_nan_in_grad=False,
    )
    groups = model.parallel.groups
    ddp = [
        # As in Megatron's own training: only the first chunk's gradients are reduced in buckets.
        DistributedDataParallel(model.config, config, chunk, disable_bucketing=number > 0, pg_collection=groups)
        for number, chunk in enumerate(model)
    ]
    model.config.finalize_model_grads_func = finalize_model_grads
    no_sync = [chunk.no_sync for chunk in ddp]
    model.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    network = Network(model, ddp, LMHead(model, adds_in_place=not config.overlap_grad_reduce))
    if config.overlap_param_gather:
        for chunk, wrapper in zip(model, ddp, strict=True):
            chunk.register_forward_hook(partial(_finish_param_sync, wrapper))
    return network


def _finish_param_sync(ddp: DistributedDataParallel, *_: object) -> None:
    """Wait for the head's weights: Megatron waits for those of a module before its forward, and the head has none."""
    for group in ddp.bucket_groups:
        group.finish_param_sync()


class StudentOptimizer:
    """One update at a time: ``zero_grad``, (forward-backward), ``step``.

    Args:
        network: the wrapped student.
        settings: AdamW and schedule.
    """

    def __init__(self, network: Network, settings: OptimizerSettings) -> None:
        params_dtype, ddp_config = network.model.options.params_dtype, network.ddp[0].ddp_config
        self.network = network
        self.settings = settings
        config = OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            decoupled_weight_decay=settings.decoupled_weight_decay,
            clip_grad=settings.clip_grad,
            bf16=params_dtype == torch.bfloat16,
            params_dtype=params_dtype,
            use_distributed_optimizer=ddp_config.use_distributed_optimizer,
            overlap_param_gather=ddp_config.overlap_param_gather,
            fp8_recipe=settings.fp8_recipe,
        )
        self.megatron: MegatronOptimizer = get_megatron_optimizer(config, list(network.ddp))
        network.model.config.grad_scale_func = self.megatron.scale_loss
        self.scheduler = OptimizerParamScheduler(
            self.megatron,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=settings.decay_steps,
            lr_decay_style=settings.decay_style,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=settings.decay_steps,
            wd_incr_style="constant",
        )

    @property
    def lr(self) -> float:
        """Learning rate of the next update."""
        return float(self.megatron.param_groups[0]["lr"])

    @property
    def adam_package(self) -> str:
        """Whose Adam Megatron has found: of ``transformer_engine``, ``apex`` or ``torch``."""
        return type(self._parts[0].optimizer).__module__.partition(".")[0]

    @staticmethod
    def is_skipped(grad_norm: float, loss: float = 0.0) -> bool:
        """Whether ``step`` leaves the weights alone at this gradient norm and loss."""
        return not (0 < grad_norm < math.inf and math.isfinite(loss))

    def zero_grad(self) -> None:
        """Clear the gradient buffers of DDP and the optimizer."""
        self.network.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self, loss: float = 0.0) -> float:
        """Clip, update, advance the schedule; return the gradient norm before clipping.

        Where the norm or the loss is not finite, or the norm is 0 because nothing was supervised, the update is skipped: weights
        and moments stay as they are and only the schedule advances.
        """
        self.megatron.prepare_grads()
        grad_norm = self.megatron.get_grad_norm()
        if not self.is_skipped(grad_norm, loss):
            if self.settings.clip_grad > 0:
                parameters = [parameter for group in self.megatron.param_groups for parameter in group["params"]]
                clip_grad_by_total_norm_fp32(parameters, self.settings.clip_grad, grad_norm)
            self.megatron.step_with_ready_grads()
        self.scheduler.step(1)
        return float(grad_norm)

    # -- checkpoints --

    def sharded_state_dict(self, weights: dict[str, Any], is_loading: bool = False) -> dict[str, Any]:
        """Megatron's sharded view of moments and master weights; before the first update there are none to save.

        Args:
            weights: the student's ``sharded_weights``, which say how each parameter is sharded.
            is_loading: whether a checkpoint is to be read into it.
        """
        distributed = [part for part in self._parts if isinstance(part, DistributedOptimizer)]
        if not distributed:
            return self.megatron.sharded_state_dict(weights, is_loading=is_loading)  # type: ignore[no-any-return]
        if is_loading:
            for part in distributed:
                _fill_state(part)
        return self.megatron.sharded_state_dict(  # type: ignore[no-any-return]
            weights, is_loading=is_loading, metadata=_SHARDING
        )

    def load_state_dict(self, state: dict[str | int, Any]) -> None:
        """Take over what was loaded into ``sharded_state_dict``: of several parts it has one under each number."""
        if not any(_counts_by_parameter(part) for part in self._parts):
            self.megatron.load_state_dict(state)
            return
        states = [state] if len(self._parts) == 1 else [state[number] for number in range(len(self._parts))]
        for part, own in zip(self._parts, states, strict=True):
            _load_counted_by_parameter(part, own)

    @property
    def _parts(self) -> list[MegatronOptimizer]:
        return getattr(self.megatron, "chained_optimizers", [self.megatron])


def _counts_by_parameter(part: MegatronOptimizer) -> bool:
    """Whether a distributed optimizer runs torch's Adam, as it does without Transformer Engine and Apex.

    Torch counts the steps of each parameter, the others those of a group. Megatron saves such an optimizer but fails to
    load it: it asserts that a fresh one has counts already, and looks for them among the loaded moments.
    """
    return isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, (torch.optim.Adam, torch.optim.AdamW))


def _fill_state(part: DistributedOptimizer) -> None:
    if _counts_by_parameter(part):
        part.init_state_fn(part.optimizer, part.config)
        for state in part.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def _load_counted_by_parameter(part: DistributedOptimizer, state: dict[str | int, Any]) -> None:
    part.load_state_dict({key: value for key, value in state.items() if key != "param_state"})
    states = list(part.optimizer.state.values())
    counts = [of_parameter.pop("step") for of_parameter in states]
    part.load_parameter_state_from_fully_reshardable(state["param_state"])
    for of_parameter, count in zip(states, counts, strict=True):
        # Megatron hands the same tensor to all parameters: each of them would count it up.
        of_parameter["step"] = count.clone()
