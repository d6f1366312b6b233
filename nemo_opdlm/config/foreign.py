"""Keys of other NeMo versions and other OPDLM code: dropped with one warning, refused, or pointed elsewhere."""

import logging
from collections.abc import Iterator
from typing import Any

from nemo_opdlm.data.shown import shown

_logger = logging.getLogger(__name__)

#: Names used elsewhere, the last part of a key or a full one -> our key.
RENAMED = {
    "trainer.opdlm": "trainer.* or, for save_interval, exp_manager.checkpoint_callback_params.every_n_train_steps",
    "topk_logits_k": "model.opdlm.divergence_top_k",
    "top_k_logits": "model.opdlm.divergence_top_k",
    "kl_type": "model.opdlm.divergence",
    "loss_type": "model.opdlm.divergence",
    "exclude_im_end": "model.opdlm.exclude_end_token",
    "random_mask": "model.opdlm.state_selection",
    "num_task_per_step": "model.opdlm.rollout.num_prompts_per_step",
    "num_response_per_task": "model.opdlm.rollout.num_responses_per_prompt",
    "num_generations_per_prompt": "model.opdlm.rollout.num_responses_per_prompt",
    "denoising_steps_per_block": "model.opdlm.rollout.denoising_steps",
    "remasking_strategy": "model.opdlm.rollout.remasking",
    "dynamic_threshold": "model.opdlm.rollout.threshold",
    "dynamic_threshold_schedule": "model.opdlm.rollout.threshold_schedule",
    "max_token_schedule": "model.opdlm.rollout.max_new_tokens_schedule",
    "pretrained_model": "model.restore_from_path",
    "teacher_model": "model.kd_teacher_restore_from_path",
    "learning_rate": "model.optim.lr",
    "min_lr_scale": "model.optim.sched.min_lr",
    "max_grad_norm": "trainer.gradient_clip_val",
    "save_every": "exp_manager.checkpoint_callback_params.every_n_train_steps",
    "save_interval": "exp_manager.checkpoint_callback_params.every_n_train_steps",
    "file_name": "model.data.train_ds.file_path",
    "recompute_granularity": "model.activations_checkpoint_granularity",
    "recompute_method": "model.activations_checkpoint_method",
    "recompute_num_layers": "model.activations_checkpoint_num_layers",
}

#: Section -> keys that change nothing here, whatever their value.
_WITHOUT_EFFECT = {
    "": "nsys_profile",
    "trainer": "inference_mode reload_dataloaders_every_n_epochs replace_sampler_ddp amp_level auto_lr_find",
    "exp_manager": "log_local_rank_0_only log_global_rank_0_only create_ipl_epoch_stopper_callback "
    "ipl_epoch_stopper_callback_params",
    "exp_manager.checkpoint_callback_params": "filepath",
    "model": """
        name encoder_seq_length override_vocab_size use_cpu_initialization
        use_scaled_init_method use_tp_pp_dp_mapping overlap_p2p_comm batch_p2p_comm
        nccl_communicator_config_path sharp gc_interval native_amp_init_scale
        native_amp_growth_interval hysteresis reduce_amax skip_fp8_attention_checkpoint_load
        fp16_lm_cross_entropy attention_backend use_flash_attention use_te_rng_tracker
        ub_tp_comm_overlap_cfg grad_div_ar_fusion bias_activation_fusion
        bias_dropout_add_fusion masked_softmax_fusion get_attention_mask_from_fusion apply_rope_fusion
        persist_layer_norm num_micro_batches_with_partial_activation_checkpoints
        activations_checkpoint_layers_per_pipeline cpu_offloading_num_layers cpu_offloading_activations
        cpu_offloading_weights gradient_as_bucket_view sync_batch_comm defer_embedding_wgrad_compute
        grad_allreduce_chunk_size_mb dist_ckpt_format dist_ckpt_load_on_device dist_ckpt_parallel_save
        dist_ckpt_parallel_save_within_dp dist_ckpt_parallel_load dist_ckpt_torch_dist_multiproc
        dist_ckpt_assume_constant_structure dist_ckpt_parallel_dist_opt dist_ckpt_load_strictness nsys_profile
        enable_megatron_timers megatron_timer_kwargs skip_train hidden_act pre_process post_process onnx_safe
        precision megatron_legacy data_prefix
    """,
    "model.optim": """
        bucket_cap_mb contiguous_grad_buffer contiguous_param_buffer
        grad_sync_dtype capturable master_weights
    """,
    "model.data": "data_impl data_prefix seq_length num_workers dataloader_type validation_drop_last splits_string "
    "test_ds",
    "model.tokenizer": "model use_fast vocab_file merge_file sentencepiece_legacy delimiter",
}

#: Keys that NeMo itself writes into a saved model section.
_WRITTEN_BY_NEMO = ("model.target", "model.nemo_version")

_OFF = (None, False)
#: Key -> the values that ask for what is done anyway, and why others are refused.
_ONLY_NEUTRAL: dict[str, tuple[tuple[Any, ...], str]] = {
    "trainer.strategy": ((None, "auto"), "the strategy is Megatron's"),
    "trainer.plugins": ((None, []), "precision and cluster are set by other keys"),
    "trainer.callbacks": ((None, []), "callbacks are exp_manager's"),
    "trainer.profiler": ((None,), "use the profiling tools of your machine"),
    "trainer.gradient_clip_algorithm": ((None, "norm"), "Megatron clips the global norm"),
    "trainer.sync_batchnorm": (_OFF, "the model has no batch norm"),
    "trainer.overfit_batches": ((None, 0, 0.0), "use a smaller prompt file"),
    "trainer.fast_dev_run": ((None, False, 0), "set trainer.max_steps"),
    "trainer.barebones": (_OFF, "logging is part of a run"),
    "model.mcore_gpt": ((None, True), "only Megatron-core models are available"),
    "model.normalization": ((None, "rmsnorm", "RMSNorm"), "the supported families use RMSNorm"),
    "model.activation": ((None, "fast-swiglu", "swiglu"), "the supported families use SwiGLU"),
    "model.position_embedding_type": ((None, "rope"), "the supported families use rotary positions"),
    "model.rotary_percentage": ((None, 1, 1.0), "rotary positions turn the whole head"),
    "model.rotary_interleaved": (_OFF, "rotary positions turn halves, as in Hugging Face models"),
    "model.seq_len_interpolation_factor": ((None,), "use model.rope_scaling"),
    "model.hidden_dropout": ((None, 0, 0.0), "the method trains without dropout"),
    "model.attention_dropout": ((None, 0, 0.0), "the method trains without dropout"),
    "model.ffn_dropout": ((None, 0, 0.0), "the method trains without dropout"),
    "model.rampup_batch_size": ((None,), "the rollout fixes the batch"),
    "model.expert_model_parallel_size": ((None, 1), "mixture-of-experts models are not available"),
    "model.num_moe_experts": ((None,), "mixture-of-experts models are not available"),
    "model.moe_router_topk": ((None, 2), "mixture-of-experts models are not available"),
    "model.moe_grouped_gemm": (_OFF, "mixture-of-experts models are not available"),
    "model.moe_z_loss_coeff": ((None,), "mixture-of-experts models are not available"),
    "model.moe_router_load_balancing_type": ((None, "aux_loss"), "mixture-of-experts models are not available"),
    "model.account_for_embedding_in_pipeline_split": (_OFF, "layers are split evenly over pipeline stages"),
    "model.account_for_loss_in_pipeline_split": (_OFF, "layers are split evenly over pipeline stages"),
    "model.fp32_residual_connection": (_OFF, "residuals have the model's precision"),
    "model.apply_query_key_layer_scaling": (_OFF, "attention scores are not rescaled"),
    "model.use_emha": (_OFF, "there is no fused multi-head attention here"),
    "model.cpu_offloading": (_OFF, "activations are not offloaded"),
    "model.enable_cuda_graph": (_OFF, "CUDA graphs are not available"),
    "model.fsdp": (_OFF, "use the distributed optimizer"),
    "model.restore_from_ckpt": ((None,), "use exp_manager.resume_from_checkpoint"),
    "model.resume_from_checkpoint": ((None,), "use exp_manager.resume_from_checkpoint"),
    "model.reset_lr": (_OFF, "start a new run from model.restore_from_path"),
    "model.reset_lr_steps": (_OFF, "start a new run from model.restore_from_path"),
}


def drop_foreign_keys(values: dict[str, Any], section: str = "") -> dict[str, Any]:
    """Return `values` of a section without the keys that have no effect here, and warn of them once.

    Raises:
        ValueError: a key asks for something that is not done here, e.g. dropout.
    """
    dropped: list[str] = []
    cleaned = _clean(_aligner_checkpoint(values), section, dropped)
    if dropped:
        _logger.warning("These keys have no effect here and are ignored: %s", ", ".join(dropped))
    return cleaned


def _aligner_checkpoint(values: dict[str, Any]) -> dict[str, Any]:
    """NeMo-Aligner's `pretrained_checkpoint.restore_from_path` is another name for `model.restore_from_path`."""
    section = values.get("pretrained_checkpoint")
    if not isinstance(section, dict) or set(section) != {"restore_from_path"}:
        return values
    values = {key: value for key, value in values.items() if key != "pretrained_checkpoint"}
    path, model = section["restore_from_path"], values.get("model", {})
    if not isinstance(model, dict) or path is None:
        return values
    given = model.get("restore_from_path")
    if given not in (None, path):
        raise ValueError(
            f"pretrained_checkpoint.restore_from_path={shown(path)} contradicts model.restore_from_path={shown(given)}; "
            "give one"
        )
    return values | {"model": model | {"restore_from_path": path}}


def _clean(section: dict[str, Any], path: str, dropped: list[str]) -> dict[str, Any]:
    return dict(_kept(section, path, dropped))


def _kept(section: dict[str, Any], path: str, dropped: list[str]) -> Iterator[tuple[str, Any]]:
    ignored = _WITHOUT_EFFECT.get(path, "").split()
    for name, value in section.items():
        key = f"{path}.{name}" if path else str(name)
        if key in _WRITTEN_BY_NEMO:
            continue
        if name in ignored:
            dropped.append(key)
        elif key in _ONLY_NEUTRAL:
            _refuse_unless_neutral(key, value)
        else:
            yield name, _clean(value, key, dropped) if isinstance(value, dict) else value


def _refuse_unless_neutral(key: str, value: Any) -> None:
    neutral, why = _ONLY_NEUTRAL[key]
    if not any(value == allowed and isinstance(value, bool) == isinstance(allowed, bool) for allowed in neutral):
        allowed = " or ".join("null" if item is None else repr(item) for item in neutral)
        raise ValueError(f"{key}={shown(value)} is not supported: {why}; allowed: {allowed}")
