"""Rules about single keys, as tables."""

import re
from collections.abc import Callable
from typing import Any

from nemo_opdlm.config.architecture import LARGEST_DIVISOR

_MAX_BLOCK_SIZE = 64
_DURATION = re.compile(r"[0-9]{1,5}:[0-9]{2}:[0-9]{2}:[0-9]{2}")


def _is_duration(value: Any) -> bool:
    return _DURATION.fullmatch(value) is not None


#: Key -> (what its value must satisfy, that rule in words). Null is not checked here.
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "trainer.devices": (lambda v: v == "auto" or v == -1 or v >= 1, "at least 1, -1 or 'auto'"),
    "trainer.num_nodes": (lambda v: v >= 1, "at least 1"),
    "trainer.max_steps": (lambda v: v >= 1, "at least 1"),
    "trainer.log_every_n_steps": (lambda v: v >= 1, "at least 1"),
    "trainer.val_check_interval": (lambda v: v >= 1, "at least 1 optimizer step, or null"),
    "trainer.gradient_clip_val": (lambda v: v >= 0, "at least 0"),
    "trainer.max_time": (_is_duration, "a time DD:HH:MM:SS"),
    "exp_manager.max_time_per_run": (_is_duration, "a time DD:HH:MM:SS"),
    "exp_manager.seconds_to_sleep": (lambda v: v >= 0, "at least 0"),
    "exp_manager.checkpoint_callback_params.every_n_train_steps": (lambda v: v >= 1, "at least 1, or null"),
    "exp_manager.checkpoint_callback_params.save_top_k": (lambda v: v >= -1, "at least 0, or -1 for all"),
    "model.seed": (lambda v: 0 <= v < 2**31, "from 0 to 2147483647"),
    "model.micro_batch_size": (lambda v: v >= 1, "at least 1"),
    "model.global_batch_size": (lambda v: v >= 1, "at least 1"),
    "model.tensor_model_parallel_size": (lambda v: v >= 1, "at least 1"),
    "model.pipeline_model_parallel_size": (lambda v: v >= 1, "at least 1"),
    "model.virtual_pipeline_model_parallel_size": (lambda v: v >= 2, "at least 2, or null"),
    "model.context_parallel_size": (lambda v: v >= 1, "at least 1"),
    "model.make_vocab_size_divisible_by": (
        lambda v: 1 <= v <= LARGEST_DIVISOR,
        f"1 to {LARGEST_DIVISOR}, or null",
    ),
    "model.distributed_timeout_minutes": (lambda v: v > 0, "above 0"),
    "model.log_samples_every_n_steps": (lambda v: v >= 1, "at least 1 optimizer step, or null"),
    "model.num_logged_samples": (lambda v: v >= 1, "at least 1"),
    "model.device_peak_tflops": (lambda v: v > 0, "above 0, or null"),
    "model.activations_checkpoint_num_layers": (lambda v: v >= 1, "at least 1"),
    "model.fp8_margin": (lambda v: v >= 0, "at least 0"),
    "model.fp8_amax_history_len": (lambda v: v >= 1, "at least 1"),
    "model.fp8_interval": (lambda v: v >= 1, "at least 1"),
    "model.num_layers_at_start_in_bf16": (lambda v: v >= 0, "at least 0"),
    "model.num_layers_at_end_in_bf16": (lambda v: v >= 0, "at least 0"),
    "model.optim.lr": (lambda v: v > 0, "above 0"),
    "model.optim.weight_decay": (lambda v: v >= 0, "at least 0"),
    "model.optim.betas": (lambda v: all(0 <= beta < 1 for beta in v), "two numbers from 0 to below 1"),
    "model.optim.eps": (lambda v: v > 0, "above 0"),
    "model.optim.sched.warmup_steps": (lambda v: v >= 0, "at least 0"),
    "model.optim.sched.min_lr": (lambda v: v >= 0, "at least 0"),
    "model.optim.sched.max_steps": (lambda v: v >= 1, "at least 1"),
    "model.data.train_ds.max_prompt_length": (lambda v: v >= 1, "at least 1"),
    "model.data.validation_ds.max_prompt_length": (lambda v: v >= 1, "at least 1"),
    "model.data.validation_ds.num_samples": (lambda v: v >= 1, "at least 1"),
    "model.data.validation_ds.response_length": (lambda v: v >= 1, "at least 1"),
    "model.opdlm.block_size": (lambda v: 1 <= v <= _MAX_BLOCK_SIZE, f"from 1 to {_MAX_BLOCK_SIZE}"),
    "model.opdlm.mask_token_id": (lambda v: v >= 0, "a token id, at least 0"),
    "model.opdlm.reverse_kl_weight": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "model.opdlm.jsd_alpha": (lambda v: 0 < v < 1, "between 0 and 1, both excluded"),
    "model.opdlm.divergence_top_k": (lambda v: v >= 0, "0 (full vocabulary) or a number of tokens"),
    "model.opdlm.states_per_rollout": (lambda v: v >= 1, "at least 1"),
    "model.opdlm.epochs_per_rollout": (lambda v: v >= 1, "at least 1"),
    "model.opdlm.ar_loss_weight": (lambda v: 0 <= v < float("inf"), "at least 0 (0 = none)"),
    "model.opdlm.pack_to_tokens": (lambda v: v >= 1, "at least 1, or null"),
    "model.opdlm.max_trained_tokens": (lambda v: v >= 1, "at least 1, or null"),
    "model.opdlm.max_consecutive_skips": (lambda v: v >= 1, "at least 1"),
    "model.opdlm.rollout.num_prompts_per_step": (lambda v: v >= 1, "at least 1"),
    "model.opdlm.rollout.num_responses_per_prompt": (lambda v: v >= 1, "at least 1"),
    "model.opdlm.rollout.temperature": (lambda v: v >= 0, "at least 0 (0 = greedy)"),
    "model.opdlm.rollout.top_p": (lambda v: 0 < v <= 1, "above 0, at most 1 (1 = off)"),
    "model.opdlm.rollout.top_k": (lambda v: v >= 0, "at least 0 (0 = off)"),
    "model.opdlm.rollout.threshold": (lambda v: 0 < v <= 1, "above 0, at most 1"),
    "model.opdlm.rollout.entropy_bound": (lambda v: v > 0, "above 0"),
    "model.opdlm.rollout.max_new_tokens": (lambda v: v >= 1, "at least 1"),
    "model.opdlm.rollout.max_batch_size": (lambda v: v >= 1, "at least 1"),
    "model.opdlm.rollout.max_batch_tokens": (lambda v: v >= 1, "at least 1, or null"),
    "model.opdlm.rollout.max_garbage_frac": (lambda v: 0 < v <= 1, "above 0, at most 1, or null"),
    "model.opdlm.rollout.garbage_warmup_steps": (lambda v: v >= 0, "at least 0"),
    "model.opdlm.rollout.domain_caps": (lambda v: all(cap >= 1 for cap in v.values()), "at least 1 token each"),
    "model.opdlm.rollout.end_token_ids": (lambda v: all(i >= 0 for i in v), "token ids, at least 0"),
    "model.opdlm.rollout.threshold_schedule.start": (lambda v: 0 < v <= 1, "above 0, at most 1"),
    "model.opdlm.rollout.threshold_schedule.end": (lambda v: 0 < v <= 1, "above 0, at most 1"),
    "model.opdlm.rollout.threshold_schedule.hold_steps": (lambda v: v >= 0, "at least 0"),
    "model.opdlm.rollout.threshold_schedule.ramp_steps": (lambda v: v >= 1, "at least 1"),
    "model.opdlm.rollout.max_new_tokens_schedule.start": (lambda v: v >= 1, "at least 1"),
    "model.opdlm.rollout.max_new_tokens_schedule.ramp_steps": (lambda v: v >= 1, "at least 1"),
}

#: Keys with one possible value.
FIXED: dict[str, tuple[Any, str]] = {
    "trainer.logger": (False, "exp_manager creates the loggers"),
    "trainer.enable_checkpointing": (False, "exp_manager creates the checkpoint callback"),
    "trainer.use_distributed_sampler": (False, "prompts are shared out by their global index"),
    "trainer.accumulate_grad_batches": (1, "model.global_batch_size and model.micro_batch_size decide"),
    "exp_manager.ema.enable": (False, "NeMo's EMA does not know Megatron's optimizer"),
    "exp_manager.checkpoint_callback_params.save_weights_only": (False, "a run resumes with its optimizer"),
    "exp_manager.checkpoint_callback_params.async_save": (
        False,
        "NeMo's version does not run with Megatron-core; set model.dist_ckpt_async_save=True",
    ),
    "model.optim.sched.constant_steps": (0, "Megatron's schedule decays right after the warm-up"),
}

#: Recognised choices that nothing implements yet: key, value, what to do instead.
NOT_AVAILABLE: tuple[tuple[str, Any, str], ...] = (
    ("model.opdlm.block_grid", "response", "use 'absolute'"),
    ("model.opdlm.attention", "split", "use 'auto'"),
    ("trainer.precision", "16-mixed", "use 'bf16' or 'bf16-mixed'"),
)

#: Fields of Megatron's TransformerConfig -> the key of the model section that they follow from, where it has another name.
OWN_KEYS = {
    "fp8_param": "fp8_params",
    "tp_comm_overlap": "ub_tp_comm_overlap",
    "recompute_granularity": "activations_checkpoint_granularity",
    "recompute_method": "activations_checkpoint_method",
    "recompute_num_layers": "activations_checkpoint_num_layers",
}
