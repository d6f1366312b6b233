"""From the schema's keys to the settings of Megatron and of the held-out set."""

from dataclasses import fields, replace
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from nemo_opdlm.config import Architecture, ModelConfig, parse
from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.sampler import RolloutSettings
from nemo_opdlm.megatron.optimizer import DECAY_STYLES, OptimizerSettings
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.models.method import Method

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
    """How student and teacher are held.

    ``bf16`` = bf16 parameters with fp32 master weights, ``bf16-mixed`` = fp32 parameters under autocast.
    """
    recompute = {
        "recompute_granularity": config.activations_checkpoint_granularity,
        "recompute_method": config.activations_checkpoint_method,
        "recompute_num_layers": config.activations_checkpoint_num_layers,
    }
    return ModelOptions(
        params_dtype=torch.bfloat16 if precision == "bf16" else torch.float32,
        autocast_dtype=torch.bfloat16 if precision == "bf16-mixed" else None,
        sequence_parallel=config.sequence_parallel,
        initialize=False,
        transformer_config={**recompute, **config.mcore_customization_config},
    )


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
        decay_style=DECAY_STYLES[sched.name],
        warmup_steps=sched.warmup_steps,
        decay_steps=decay_steps,
    )


def heldout_settings(method: Method) -> RolloutSettings:
    """Decoding settings of the held-out set: nothing in them depends on the run but block size and special tokens."""
    return replace(method.rollout_settings(1), seed=HELDOUT_SEED, step=0)
