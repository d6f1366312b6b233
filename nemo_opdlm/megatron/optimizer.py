"""Megatron's DDP, optimizer and learning-rate schedule around the student."""

import math
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
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


def wrap(model: StagedGPT, settings: OptimizerSettings) -> Network:
    """Put the student into Megatron's DDP (fp32 gradient buffers, summed over data- and context-parallel ranks)."""
    distributed = settings.distributed and not wants_cpu()
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=distributed,
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
    return Network(model, ddp, LMHead(model))


class StudentOptimizer:
    """One update at a time: ``zero_grad``, (forward-backward), ``step``.

    Args:
        network: the wrapped student.
        settings: AdamW and schedule.
    """

    def __init__(self, network: Network, settings: OptimizerSettings) -> None:
        params_dtype = network.model.options.params_dtype
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
            use_distributed_optimizer=settings.distributed and not wants_cpu(),
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

    @staticmethod
    def is_skipped(grad_norm: float) -> bool:
        """Whether ``step`` leaves the weights alone at this gradient norm."""
        return not 0 < grad_norm < math.inf

    def zero_grad(self) -> None:
        """Clear the gradient buffers of DDP and the optimizer."""
        self.network.zero_grad_buffer()
        self.megatron.zero_grad()

    def step(self) -> float:
        """Clip, update, advance the schedule; return the gradient norm before clipping.

        Where the norm is not finite, or 0 because nothing was supervised, the update is skipped: weights and moments stay as
        they are and only the schedule advances.
        """
        self.megatron.prepare_grads()
        grad_norm = self.megatron.get_grad_norm()
        if not self.is_skipped(grad_norm):
            if self.settings.clip_grad > 0:
                parameters = [parameter for group in self.megatron.param_groups for parameter in group["params"]]
                clip_grad_by_total_norm_fp32(parameters, self.settings.clip_grad, grad_norm)
            self.megatron.step_with_ready_grads()
        self.scheduler.step(1)
        return float(grad_norm)
