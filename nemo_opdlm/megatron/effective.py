"""What a run really uses of precision, fused kernels, overlapped communication and recomputation, in one line."""

import torch

from nemo_opdlm.megatron.optimizer import StudentOptimizer
from nemo_opdlm.megatron.student import StagedGPT
from nemo_opdlm.megatron.teacher import Teacher

_DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


def effective_settings(optimizer: StudentOptimizer, teacher: Teacher | None) -> str:
    """Read off what Megatron was given, whatever the configuration asked for; what is missing is named."""
    network, asked = optimizer.network.model, optimizer.settings
    config, options, ddp = network.config, network.options, optimizer.network.ddp[0].ddp_config
    recomputation = (config.recompute_granularity, config.recompute_method, config.recompute_num_layers)
    settings = {
        "precision": _precision(network),
        "layers": "Transformer Engine" if options.transformer_engine else "Megatron",
        "fp8": f"{config.fp8}, {config.fp8_recipe}{', weights too' * config.fp8_param}" if config.fp8 else "off",
        "adam": f"{optimizer.adam_package}, {'sharded' if ddp.use_distributed_optimizer else 'whole'} state",
        "gradient_accumulation_fusion": _switch(
            config.gradient_accumulation_fusion, options.gradient_accumulation_fusion, "Apex's kernel and a GPU"
        ),
        "overlap_grad_sync": _switch(ddp.overlap_grad_reduce),
        "overlap_param_sync": _switch(ddp.overlap_param_gather, asked.overlap_param_sync, "a GPU"),
        "ub_tp_comm_overlap": _switch(config.tp_comm_overlap),
        "recomputation": ", ".join(str(part) for part in recomputation if part is not None) or "off",
        "teacher": "none" if teacher is None else _teacher(teacher.network),
    }
    return "Effective settings: " + "; ".join(f"{name}: {value}" for name, value in settings.items())


def _precision(network: StagedGPT) -> str:
    options = network.options
    if options.autocast_dtype is not None:
        return f"{_DTYPES[options.params_dtype]} parameters, {_DTYPES[options.autocast_dtype]} autocast"
    masters = ", fp32 masters" if options.params_dtype != torch.float32 else ""
    return f"{_DTYPES[options.params_dtype]} parameters{masters}"


def _switch(is_on: bool, is_asked_for: bool = False, needs: str = "") -> str:
    return "on" if is_on else f"off, needs {needs}" if is_asked_for else "off"


def _teacher(network: StagedGPT) -> str:
    return _DTYPES[network.options.params_dtype] + (", offloaded" if network.is_offloaded else "")
