"""From the schema's keys to the settings of Megatron and of the held-out set."""

from dataclasses import fields, replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_opdlm.config import FP8_RECIPES, Architecture, ModelConfig, parse
from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.megatron.optimizer import DECAY_STYLES, OptimizerSettings
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.models.method import Method
from nemo_opdlm.models.precision import PRECISIONS

#: The teacher answers held-out prompts at temperature 1, unfiltered.
HELDOUT_SAMPLING = SamplingParams(temperature=1.0)
#: Fixed, so that held-out figures of different runs may be compared.
HELDOUT_SEED = 20260606
#: Keys of a stored model section that are not settings of a run: NeMo's own and those taken over from ``trainer``.
_NOT_SETTINGS = ("target", "nemo_version", "origin", "precision", "gradient_clip_val")


def model_section(cfg: DictConfig) -> tuple[ModelConfig, Architecture, str]:
    """Read the config of a model instance: the checked settings, the architecture and the precision.

    Raises:
        ValueError: unknown keys, or an architecture key is missing.
    """
    plain: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True)  # type: ignore[assignment]
    settings = {key: value for key, value in plain.items() if key not in _NOT_SETTINGS}
    config = parse(settings, ModelConfig, "model")
    return config, architecture(config), str(plain.get("precision", "32"))


def architecture(config: ModelConfig) -> Architecture:
    """The network that the model section describes.

    Raises:
        ValueError: a required key is null.
    """
    given = {field.name: getattr(config, field.name) for field in fields(Architecture)}
    missing = [name for name in ("num_layers", "hidden_size", "ffn_hidden_size", "vocab_size") if given[name] is None]
    if missing:
        raise ValueError(f"model.{missing[0]} is null: the architecture comes with the weights of restore_from_path")
    return Architecture(**{name: value for name, value in given.items() if value is not None})


def model_options(config: ModelConfig, precision: str) -> ModelOptions:
    """How the student is held.

    ``bf16`` = bf16 parameters with fp32 master weights, ``bf16-mixed`` = fp32 parameters under autocast.
    """
    if precision == "bf16-mixed" and config.megatron_amp_O2:
        precision = "bf16"
    return ModelOptions(
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        autocast_dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
        sequence_parallel=config.sequence_parallel,
        initialize=False,
        transformer_engine=config.transformer_engine,
        token_multiple=token_multiple(config),
        gradient_accumulation_fusion=config.gradient_accumulation_fusion,
        attention=config.opdlm.attention,
        transformer_config={
            **_recomputation(config),
            **_fp8(config),
            **({"tp_comm_overlap": True} if config.ub_tp_comm_overlap else {}),
            **config.mcore_customization_config,
        },
    )


def token_multiple(config: ModelConfig) -> int:
    """What every rank's tokens of a forward pass have to be a multiple of: FP8's tiles."""
    return FP8_RECIPES[config.fp8_recipe].multiple if config.fp8 else 1


def teacher_options(config: ModelConfig, student: ModelOptions) -> ModelOptions:
    """How the teacher is held: as the student but for ``model.opdlm.teacher.precision``, and never in FP8.

    Its passes have many shapes, so it does without user buffers, too.
    """
    of_training = (*_FP8_FIELDS, "tp_comm_overlap")
    others = {name: value for name, value in student.transformer_config.items() if name not in of_training}
    options = replace(student, token_multiple=1, transformer_config=others)
    precision = config.opdlm.teacher.precision
    if precision is None:
        return options
    return replace(options, params_dtype=PRECISIONS[precision], autocast_dtype=None)


def teacher_rows(config: ModelConfig) -> int:
    """Rows of one causal pass of the teacher: without gradients there is room for more than the student's."""
    return max(config.micro_batch_size, 8)


def _recomputation(config: ModelConfig) -> dict[str, Any]:
    return {
        "recompute_granularity": config.activations_checkpoint_granularity,
        "recompute_method": config.activations_checkpoint_method,
        "recompute_num_layers": config.activations_checkpoint_num_layers,
    }


#: Megatron's field -> our key.
_FP8_FIELDS = {
    "fp8": "fp8",
    "fp8_recipe": "fp8_recipe",
    "fp8_margin": "fp8_margin",
    "fp8_interval": "fp8_interval",
    "fp8_amax_history_len": "fp8_amax_history_len",
    "fp8_amax_compute_algo": "fp8_amax_compute_algo",
    "fp8_param": "fp8_params",
    "fp8_wgrad": "fp8_wgrad",
    "tp_only_amax_red": "tp_only_amax_red",
    "first_last_layers_bf16": "first_last_layers_bf16",
    "num_layers_at_start_in_bf16": "num_layers_at_start_in_bf16",
    "num_layers_at_end_in_bf16": "num_layers_at_end_in_bf16",
}


def _fp8(config: ModelConfig) -> dict[str, Any]:
    if not config.fp8:
        return {}
    # All of them: Megatron's own defaults differ from NeMo's.
    values = {field: getattr(config, key) for field, key in _FP8_FIELDS.items()}
    return {**values, "fp8": "e4m3" if config.fp8_e4m3 else "hybrid"}


def optimizer_settings(config: ModelConfig, max_steps: int, clip_grad: float | None) -> OptimizerSettings:
    """Megatron's Adam and schedule for a run of ``max_steps`` updates."""
    optim, sched = config.optim, config.optim.sched
    decay_steps = sched.max_steps or max_steps
    return OptimizerSettings(
        lr=optim.lr,
        min_lr=sched.min_lr,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        eps=optim.eps,
        clip_grad=clip_grad or 0.0,
        decoupled_weight_decay=optim.decoupled_weight_decay,
        distributed=optim.distributed,
        overlap_grad_sync=optim.overlap_grad_sync,
        overlap_param_sync=optim.overlap_param_sync,
        fp8_recipe=config.fp8_recipe if config.fp8 else None,
        fp8_params=config.fp8_params,
        decay_style=DECAY_STYLES[sched.name],
        warmup_steps=sched.warmup_steps,
        decay_steps=decay_steps,
    )


def heldout_settings(method: Method) -> RolloutSettings:
    """Decoding settings of the held-out set: nothing in them depends on the run but block size and special tokens."""
    return replace(method.rollout_settings(1), seed=HELDOUT_SEED, step=0)
