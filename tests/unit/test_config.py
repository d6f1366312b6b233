"""The schema: defaults, strict reading, cross-key rules and the command line; the shipped configurations: `test_conf.py`."""

import ast
import importlib.util
import logging
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args

import pytest
from omegaconf import OmegaConf

from nemo_opdlm.config import (
    Architecture,
    Config,
    ModelConfig,
    check_apex,
    full_keys,
    parse,
    to_container,
    to_dictconfig,
    validate,
    validate_architecture,
    validate_layout,
)
from nemo_opdlm.config import exp_manager as exp_manager_schema
from nemo_opdlm.config import method as method_schema

REPOSITORY = Path(__file__).resolve().parents[2]
QWEN3_0_6B = Architecture(
    num_layers=28,
    hidden_size=1024,
    ffn_hidden_size=3072,
    num_attention_heads=16,
    vocab_size=151936,
    max_position_embeddings=40960,
    num_query_groups=8,
    kv_channels=128,
    rotary_base=1e6,
    qk_layernorm=True,
    share_embeddings_and_output_weights=True,
)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """The required keys, pointing at files that exist."""
    for name in ("ar.nemo", "prompts.jsonl"):
        (tmp_path / name).touch()
    return {
        "model.restore_from_path": str(tmp_path / "ar.nemo"),
        "model.data.train_ds.file_path": str(tmp_path / "prompts.jsonl"),
    }


def checked(files: dict[str, str], environment: Mapping[str, str] | None = None, **overrides: Any) -> Config:
    """A valid configuration with overrides by full key, read under the environment of a launcher."""
    composed = OmegaConf.create({})
    for key, value in {"trainer.max_steps": 1000, "trainer.accelerator": "cpu", **files, **overrides}.items():
        OmegaConf.update(composed, key, value)
    return validate(parse(composed), environment=environment or {})


# --- defaults -------------------------------------------------------------------------------------------------------


def test_defaults_are_the_published_recipe() -> None:
    config = Config()
    opdlm, rollout, optim = config.model.opdlm, config.model.opdlm.rollout, config.model.optim
    assert (opdlm.block_size, opdlm.denoising_steps, opdlm.divergence, opdlm.divergence_top_k) == (
        4,
        4,
        "forward_kl",
        0,
    )
    assert (opdlm.normalization, opdlm.state_selection, opdlm.block_grid) == (
        "sequence",
        "one_state_per_block",
        "absolute",
    )
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.threshold) == (1.0, 1.0, 0, 0.9)
    assert rollout.remasking == "low_confidence_dynamic" and rollout.threshold_schedule.type is None
    assert to_container(rollout.max_new_tokens_schedule) == {
        "type": "cos",
        "start": 100,
        "end": 4000,
        "ramp_steps": 100,
    }
    assert (rollout.num_prompts_per_step, rollout.num_responses_per_prompt, config.model.updates_per_rollout) == (
        128,
        1,
        16,
    )
    assert (optim.name, optim.lr, optim.weight_decay, optim.betas, optim.eps) == (
        "adamw",
        1e-5,
        0.0,
        (0.9, 0.999),
        1e-8,
    )
    assert (optim.sched.name, optim.sched.warmup_steps, optim.sched.min_lr) == ("CosineAnnealing", 5 * 16, 1e-6)
    assert config.trainer.gradient_clip_val == 1.0


def test_writing_and_reading_a_configuration_changes_nothing(files: dict[str, str]) -> None:
    config = checked(files, **{"model.opdlm.rollout.end_token_ids": [1, 2], "model.optim.betas": [0.8, 0.9]})
    assert parse(to_dictconfig(config)) == config
    assert parse(to_container(config)) == config


def test_a_section_can_be_read_alone() -> None:
    section = to_container(ModelConfig()) | {
        "target": "nemo_opdlm.models.opdlm_model.OPDLMModel",
        "nemo_version": "3.0.0",
    }
    assert parse(section, ModelConfig, "model") == ModelConfig()
    with pytest.raises(ValueError, match=r"^model\.opdlm\.blok_size .*did you mean model\.opdlm\.block_size\?"):
        parse({"opdlm": {"blok_size": 4}}, ModelConfig, "model")


def test_choices_are_the_names_the_pure_packages_know() -> None:
    from nemo_opdlm.diffusion.remasking import RemaskingStrategy
    from nemo_opdlm.distillation.divergence import DivergenceKind, Tail
    from nemo_opdlm.distillation.loss import Normalization

    for choices, enum in (
        (method_schema.Divergence, DivergenceKind),
        (method_schema.TailMode, Tail),
        (method_schema.NormalizationName, Normalization),
        (method_schema.Remasking, RemaskingStrategy),
    ):
        assert set(get_args(choices)) == {member.value for member in enum}


def test_exp_manager_has_the_keys_of_the_installed_nemo() -> None:
    spec = importlib.util.find_spec("nemo")
    assert spec is not None and spec.submodule_search_locations is not None
    source = Path(next(iter(spec.submodule_search_locations)), "utils", "exp_manager.py").read_text(encoding="utf-8")
    theirs = {
        node.name: {item.target.id for item in node.body if isinstance(item, ast.AnnAssign)}  # type: ignore[union-attr]
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    }
    for ours, name, unused in (
        (exp_manager_schema.ExpManagerConfig, "ExpManagerConfig", {"create_ipl_epoch_stopper_callback"}),
        (exp_manager_schema.CheckpointCallbackConfig, "CallbackParams", {"filepath"}),
        (exp_manager_schema.EarlyStoppingConfig, "EarlyStoppingParams", set()),
        (exp_manager_schema.StepTimingConfig, "StepTimingParams", set()),
        (exp_manager_schema.EMAConfig, "EMAParams", set()),
    ):
        unused = unused | ({"ipl_epoch_stopper_callback_params"} if name == "ExpManagerConfig" else set())
        assert {field.name for field in fields(ours)} == theirs[name] - unused


# --- reading --------------------------------------------------------------------------------------------------------

BAD_VALUES: list[tuple[str, Any, str]] = [
    # unknown keys: (key, value, what the message suggests)
    ("model.opdlm.blok_size", 4, "model.opdlm.block_size"),
    ("model.block_size", 4, "model.opdlm.block_size"),
    ("model.opdlm.loss_type", "forward_kl", "model.opdlm.divergence"),
    ("model.opdlm.rollout.remasking_strategy", "random", "model.opdlm.rollout.remasking"),
    ("trainer.max_step", 3, "trainer.max_steps"),
    ("model.data.train_ds.file_name", "x", "model.data.train_ds.file_path"),
    ("exp_manager.explicit_logdir", "x", "exp_manager.explicit_log_dir"),
    ("model.softmax_scale", 1.0, "model.mcore_customization_config"),
    # types, none of which may be converted silently
    ("model.opdlm.block_size", "four", "an integer"),
    ("model.opdlm.block_size", 4.0, "an integer"),
    ("model.opdlm.block_size", True, "an integer"),
    ("model.opdlm.block_size", None, "an integer"),
    ("model.sequence_parallel", 1, "true or false"),
    ("model.sequence_parallel", "yes", "true or false"),
    ("model.restore_from_path", 7, "text or null"),
    ("model.optim.lr", "fast", "a number"),
    ("model.optim.lr", float("nan"), "a number"),
    ("model.optim.betas", [0.9], "a list of 2 times a number"),
    ("model.optim.betas", 0.9, "a list of 2 times a number"),
    ("model.opdlm.rollout.end_token_ids", [1, "x"], "a list of an integer or null"),
    ("model.opdlm.rollout.domain_caps", {"math": "long"}, "a mapping from text to an integer or null"),
    ("model.opdlm.divergence", "forward-kl", "did you mean 'forward_kl'?"),
    ("model.opdlm.rollout.remasking", "low_confidence", "'low_confidence_static'"),
    ("model.data.train_ds.chat_template", "yes", "true or false or 'auto'"),
    ("trainer.precision", 16, "'bf16-mixed'"),
    ("trainer.accelerator", "tpu", "'auto', 'cpu', 'gpu'"),
    ("trainer.devices", "two", "an integer or 'auto'"),
    ("trainer.val_check_interval", 0.5, "an integer or null"),
    ("model.optim.name", "sgd", "'adamw'"),
    ("model.optim.sched.name", "Cosine", "did you mean 'CosineAnnealing'?"),
    ("model.opdlm", 3, "a section"),
    # what other NeMo versions do and this one does not
    ("model.hidden_dropout", 0.1, "allowed: null or 0"),
    ("model.normalization", "layernorm", "'rmsnorm'"),
    ("model.use_emha", True, "allowed: null or False"),
    ("model.num_moe_experts", 8, "mixture-of-experts"),
    ("model.restore_from_ckpt", "x.ckpt", "exp_manager.resume_from_checkpoint"),
    ("trainer.strategy", "ddp", "Megatron"),
    # ranges
    ("model.opdlm.block_size", 0, "from 1 to 64"),
    ("model.opdlm.block_size", 128, "from 1 to 64"),
    ("model.opdlm.rollout.denoising_steps", 0, "from 1 to block_size=4"),
    ("model.opdlm.rollout.denoising_steps", 8, "from 1 to block_size=4"),
    ("model.opdlm.rollout.threshold", 0.0, "above 0, at most 1"),
    ("model.opdlm.rollout.threshold", 1.1, "above 0, at most 1"),
    ("model.opdlm.rollout.temperature", -1.0, "at least 0"),
    ("model.opdlm.rollout.top_p", 0.0, "above 0"),
    ("model.opdlm.rollout.top_k", -1, "at least 0"),
    ("model.opdlm.rollout.num_prompts_per_step", 0, "at least 1"),
    ("model.opdlm.rollout.domain_caps", {"math": 0}, "at least 1"),
    ("model.opdlm.mask_token_id", -5, "at least 0"),
    ("model.opdlm.jsd_alpha", 1.0, "between 0 and 1"),
    ("model.opdlm.divergence_top_k", -1, "0 (full vocabulary)"),
    ("model.opdlm.states_per_rollout", 0, "at least 1"),
    ("model.opdlm.pack_to_tokens", 0, "at least 1, or null"),
    ("model.optim.lr", 0.0, "above 0"),
    ("model.optim.betas", [0.9, 1.0], "below 1"),
    ("model.micro_batch_size", 0, "at least 1"),
    ("model.data.validation_ds.num_samples", 0, "at least 1"),
    ("trainer.max_steps", 0, "at least 1"),
    ("trainer.max_steps", -1, "at least 1"),
    ("trainer.max_time", "4h", "DD:HH:MM:SS"),
    ("trainer.devices", 0, "at least 1"),
    ("model.make_vocab_size_divisible_by", 0, "1 to 65536"),
    # one possible value, or not available
    ("trainer.logger", True, "exp_manager"),
    ("trainer.accumulate_grad_batches", 2, "model.global_batch_size"),
    ("exp_manager.ema.enable", True, "Megatron's optimizer"),
    ("exp_manager.checkpoint_callback_params.async_save", True, "set model.dist_ckpt_async_save=True"),
    ("exp_manager.checkpoint_callback_params.monitor", None, "'val_loss'"),
    ("exp_manager.create_wandb_logger", True, "exp_manager.wandb_logger_kwargs={project: NAME}"),
    ("model.optim.sched.constant_steps", 5, "must be 0"),
    ("model.opdlm.block_grid", "response", "not available"),
    ("model.opdlm.attention", "split", "not available"),
    ("model.opdlm.attention", "flex", "needs a GPU"),
    ("model.opdlm.rollout.cuda_graphs", True, "needs a GPU"),
    ("model.transformer_engine", True, "needs Transformer Engine and a GPU: found no Transformer Engine and no GPU"),
    ("model.ub_tp_comm_overlap", True, "needs model.transformer_engine=True"),
    ("model.mcore_customization_config", {"fp8_param": True}, "model.fp8_params"),
    ("model.mcore_customization_config", {"hidden_size": 64}, "model.hidden_size"),
    ("model.mcore_customization_config", {"softmax_scal": 1.0}, "did you mean softmax_scale?"),
    ("model.mcore_customization_config", {"sequence_parallel": True}, "model.sequence_parallel"),
    # contradictions with the other keys
    ("trainer.max_steps", None, "must be given"),
    ("trainer.max_steps", 80, "model.optim.sched.warmup_steps=80"),
    ("model.restore_from_path", None, "must be given"),
    ("model.restore_from_path", "no/such.nemo", "does not exist"),
    ("model.kd_teacher_restore_from_path", "no/such.nemo", "does not exist"),
    ("model.tokenizer.type", "no/such/folder", "does not exist"),
    ("model.data.train_ds.file_path", None, "must be given"),
    ("model.data.train_ds.file_path", "no/such.jsonl", "does not exist"),
    ("model.data.train_ds.file_path", "/", "not a folder"),
    ("model.data.validation_ds.file_path", "no/such.jsonl", "does not exist"),
    ("model.data.train_ds.truncate_prompt_to", 4000, "from 1 to max_prompt_length=2000"),
    ("model.max_position_embeddings", 2000, "max_prompt_length=2000"),
    ("model.global_batch_size", 7, "multiple of model.global_batch_size=7"),
    ("model.micro_batch_size", 3, "micro_batch_size=3"),
    ("model.tensor_model_parallel_size", 2, "must be a multiple of model.tensor_model_parallel_size=2"),
    ("model.context_parallel_size", 0, "at least 1"),
    ("model.distributed_timeout_minutes", 0, "above 0"),
    ("model.log_samples_every_n_steps", 0, "at least 1 optimizer step, or null"),
    ("model.num_logged_samples", 0, "at least 1"),
    ("model.device_peak_tflops", 0, "above 0"),
    ("model.virtual_pipeline_model_parallel_size", 1, "at least 2, or null"),
    ("model.virtual_pipeline_model_parallel_size", 2, "pipeline_model_parallel_size=1"),
    ("model.optim.sched.min_lr", 1.0, "at most model.optim.lr"),
    ("model.opdlm.tail", "partial", "divergence_top_k=0"),
    ("model.opdlm.responses", "teacher", "'random_mask'"),
    ("model.opdlm.responses", "dataset", "'random_mask'"),
    ("model.opdlm.max_trained_tokens", 0, "at least 1, or null"),
    ("model.opdlm.rollout.max_new_tokens_schedule.type", None, "max_new_tokens"),
    ("model.opdlm.rollout.max_new_tokens_schedule.end", 10, "at least start=100"),
    ("model.activations_checkpoint_granularity", "full", "activations_checkpoint_method"),
    ("model.activations_checkpoint_method", "uniform", "granularity='full'"),
    ("model.fp8", True, "model.fp8_hybrid"),
    ("model.fp8_params", True, "needs model.fp8=True"),
    ("model.fp8_recipe", "nvfp4", "blockwise"),
    ("model.fp8_margin", -1, "at least 0"),
    ("model.fp8_interval", 0, "at least 1"),
    ("model.fp8_amax_history_len", 0, "at least 1"),
    ("model.fp8_amax_compute_algo", "mean", "most_recent"),
    ("model.num_layers_at_start_in_bf16", -1, "at least 0"),
    ("model.num_layers_at_end_in_bf16", -1, "at least 0"),
    ("model.opdlm.teacher.precision", "fp8", "bf16"),
    ("model.optim.overlap_param_sync", True, "model.optim.overlap_grad_sync=False to be True"),
    ("trainer.precision", "16-mixed", "is not available yet"),
]


HOSTILE_SETTINGS: tuple[tuple[dict[Any, Any], str], ...] = (
    ({"model": {"optim": {"lr": 10**400}}}, "model.optim.lr=an integer of more than 40 digits must be"),
    ({"trainer": {"max_steps": 2**70}}, "trainer.max_steps="),
    ({"trainer": {"max_steps": [10**5000]}}, "trainer.max_steps=a list must be"),
    ({"trainer": {"precision": 10**5000}}, "trainer.precision=an integer of more than 40 digits must be"),
    ({"name": "${"}, "name: "),
    ({"name": "${name}"}, ""),
    ({"name": "${oc.env:NOT_THERE}"}, "name: "),
    ({"trainer": {"a\nb": 1}}, r"'trainer.a\nb' is not a key"),
    ({"trainer": {"x" * 10_000: 1}}, "is not a key"),
    ({"trainer": {None: 1}}, "trainer: Incompatible key type"),
    ({"trainer": "x" * 10_000}, "trainer='xxxx"),
    ({"trainer": {"max_time": "٣:00:00:00"}}, "a time DD:HH:MM:SS"),
    ({"trainer": {"max_time": f"{'9' * 12}:00:00:00"}}, "a time DD:HH:MM:SS"),
)


@pytest.mark.parametrize(("settings", "expected"), HOSTILE_SETTINGS, ids=range(len(HOSTILE_SETTINGS)))
def test_any_setting_is_refused_in_one_short_line(settings: dict[Any, Any], expected: str) -> None:
    with pytest.raises(ValueError) as caught:
        validate(parse(settings), check_files=False, environment={})
    message = str(caught.value)
    assert expected in message and len(message.splitlines()) == 1 and len(message) < 1000


def test_a_batch_size_that_is_off_by_millions_is_refused_at_once(files: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="must be a multiple of model.global_batch_size=1000000000000; nearest"):
        checked(files, **{"model.global_batch_size": 10**12})


def test_a_path_that_no_file_can_have_is_refused_by_key(files: dict[str, str]) -> None:
    with pytest.raises(OSError, match=r"model\.restore_from_path='x+\.\.\.: File name too long"):
        checked(files, **{"model.restore_from_path": "x" * 5000})


@pytest.mark.parametrize(("key", "value", "rule"), BAD_VALUES, ids=[f"{key}={value}" for key, value, _ in BAD_VALUES])
def test_a_bad_value_is_one_line_with_key_value_and_rule(
    files: dict[str, str], key: str, value: Any, rule: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        checked(files, **{key: value})
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    assert key.rpartition(".")[2] in message and rule in message
    if "is not a key" not in message:
        assert (str(next(iter(value.values()))) if isinstance(value, dict) else str(value)) in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model.opdlm.divergence": "nll", "model.opdlm.divergence_top_k": 16}, "model.opdlm.divergence_top_k=16"),
        (
            {"model.opdlm.state_selection": "all_states", "model.opdlm.states_per_rollout": 2},
            "model.opdlm.states_per_rollout=2 contradicts state_selection='all_states'",
        ),
        (
            {
                "model.dist_ckpt_async_save": True,
                "exp_manager.checkpoint_callback_params.save_last_n_optim_states": 2,
            },
            "save_last_n_optim_states=2 contradicts model.dist_ckpt_async_save=True",
        ),
        ({"model.fp8": True, "model.fp8_hybrid": True, "model.fp8_e4m3": True}, "model.fp8=True needs one of"),
        (
            {"model.ub_tp_comm_overlap": True, "model.transformer_engine": True},
            "model.ub_tp_comm_overlap=True needs model.opdlm.pack_to_tokens",
        ),
        (
            {
                "model.ub_tp_comm_overlap": True,
                "model.transformer_engine": True,
                "model.opdlm.pack_to_tokens": 8192,
                "trainer.precision": "32",
            },
            "model.ub_tp_comm_overlap=True contradicts trainer.precision='32'",
        ),
        (
            {"model.megatron_amp_O2": True, "trainer.precision": "32"},
            "model.megatron_amp_O2=True contradicts trainer.precision='32'",
        ),
        (
            {"model.optim.overlap_grad_sync": True, "model.optim.overlap_param_sync": True},
            "model.optim.name='adamw' to be 'distributed_fused_adam'",
        ),
        (
            {
                "trainer.devices": 2,
                "model.tensor_model_parallel_size": 2,
                "exp_manager.checkpoint_callback_params.always_save_nemo": True,
            },
            "exp_manager.checkpoint_callback_params.always_save_nemo=True",
        ),
        (
            {
                "exp_manager.checkpoint_callback_params.every_n_train_steps": 5,
                "exp_manager.checkpoint_callback_params.every_n_epochs": 1,
            },
            "only one of",
        ),
        (
            {"model.data.train_ds.truncate_prompt_to": 8, "model.data.train_ds.chat_template": True},
            "model.data.train_ds.truncate_prompt_to=8",
        ),
        ({"pretrained_checkpoint.restore_from_path": "other.nemo"}, "contradicts model.restore_from_path"),
        ({"optim.lr": 1.0}, "optim is not a key of this configuration; did you mean model.optim?"),
        (
            {"trainer.opdlm.save_interval": 3},
            "trainer.opdlm is not a key of this configuration; did you mean trainer.*",
        ),
        ({"model.seed": "${no_such_key}"}, "model.seed: Interpolation key 'no_such_key' not found"),
        ({"model.seed": "???"}, "model.seed"),
    ],
)
def test_contradictory_keys_are_refused(files: dict[str, str], overrides: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        checked(files, **overrides)
    assert "\n" not in str(caught.value)


# --- corrections and warnings ---------------------------------------------------------------------------------------


def test_keys_of_other_nemo_versions_are_dropped_with_one_warning(
    files: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    old = {
        "exp_manager.log_local_rank_0_only": True,
        "exp_manager.log_global_rank_0_only": True,
        "model.masked_softmax_fusion": True,
        "model.grad_div_ar_fusion": True,
        "model.optim.bucket_cap_mb": 200,
        "model.hidden_dropout": 0.0,
        "model.activation": "fast-swiglu",
        "trainer.strategy": None,
    }
    assert checked(files, **old) == checked(files)
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1
    assert all(key in warned[0] for key in list(old)[:5]) and "hidden_dropout" not in warned[0]


def test_aligners_name_of_the_starting_point_is_accepted(files: dict[str, str]) -> None:
    start = files.pop("model.restore_from_path")
    assert checked(files, **{"pretrained_checkpoint.restore_from_path": start}).model.restore_from_path == start


def test_sequence_parallelism_of_one_rank_is_switched_off(files: dict[str, str]) -> None:
    assert checked(files, **{"model.sequence_parallel": True}).model.sequence_parallel is False


def test_without_validation_the_training_loss_is_monitored(files: dict[str, str]) -> None:
    assert checked(files).exp_manager.checkpoint_callback_params.monitor == "reduced_train_loss"
    held_out = {"model.data.validation_ds.file_path": files["model.data.train_ds.file_path"]}
    assert checked(files, **held_out).exp_manager.checkpoint_callback_params.monitor == "val_loss"


@pytest.mark.parametrize("divergence", ["reverse_kl", "mixed"])
def test_a_partial_tail_that_leaks_is_warned_of(
    files: dict[str, str], caplog: pytest.LogCaptureFixture, divergence: str
) -> None:
    top_k = {"model.opdlm.divergence_top_k": 16, "model.opdlm.tail": "partial"}
    checked(files, **top_k)
    assert not caplog.records or all("tail" not in record.getMessage() for record in caplog.records)
    checked(files, **top_k, **{"model.opdlm.divergence": divergence})
    assert any("model.opdlm.tail='partial'" in record.getMessage() for record in caplog.records)


def test_a_precision_of_32_may_be_a_number(files: dict[str, str]) -> None:
    assert checked(files, **{"trainer.precision": 32}).trainer.precision == "32"


# --- architecture ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_layers": 0}, "num_layers=0"),
        ({"vocab_size": True}, "vocab_size=True"),
        ({"num_query_groups": 3}, "num_query_groups=3 must divide num_attention_heads=16"),
        ({"kv_channels": 63}, "kv_channels=63 must be even"),
        ({"hidden_size": 1000, "kv_channels": None, "num_query_groups": None}, "hidden_size=1000"),
        ({"layernorm_epsilon": 0.0}, "layernorm_epsilon=0.0"),
        ({"make_vocab_size_divisible_by": 0}, "make_vocab_size_divisible_by=0"),
        ({"make_vocab_size_divisible_by": 10**9}, "make_vocab_size_divisible_by=1000000000 must be at most 65536"),
    ],
)
def test_an_impossible_architecture_is_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        replace(QWEN3_0_6B, **change)


def test_derived_fields_and_vocabulary_padding() -> None:
    arch = replace(QWEN3_0_6B, kv_channels=None, num_query_groups=None)
    assert (arch.kv_channels, arch.num_query_groups) == (64, 16)
    assert [QWEN3_0_6B.padded_vocab_size(tp) for tp in (1, 2, 3, 7)] == [151936, 152064, 152064, 152320]
    assert replace(QWEN3_0_6B, vocab_size=151937, make_vocab_size_divisible_by=1).padded_vocab_size(2) == 151938


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"model.num_layers": 27}, "model.num_layers=27 contradicts 28"),
        ({"model.opdlm.mask_token_id": 151936}, "model.opdlm.mask_token_id=151936"),
        ({"model.opdlm.rollout.end_token_ids": [5, 200000]}, "model.opdlm.rollout.end_token_ids=200000"),
        ({"model.opdlm.divergence_top_k": 200000}, "model.opdlm.divergence_top_k=200000"),
        ({"model.data.train_ds.max_prompt_length": 40958}, "max_position_embeddings=40960"),
    ],
)
def test_a_configuration_must_fit_its_architecture(
    files: dict[str, str], overrides: dict[str, Any], expected: str
) -> None:
    config = checked(files, **{"model.global_batch_size": 16, **overrides})
    with pytest.raises(ValueError, match=re.escape(expected)):
        validate_architecture(config, QWEN3_0_6B)
    validate_architecture(checked(files), QWEN3_0_6B)


def test_without_validation_checkpoints_are_saved_every_ten_rollouts(files: dict[str, str]) -> None:
    assert checked(files).exp_manager.checkpoint_callback_params.every_n_train_steps == 10 * 16


# --- ranks ----------------------------------------------------------------------------------------------------------

TP, PP, CP = (f"model.{axis}_parallel_size" for axis in ("tensor_model", "pipeline_model", "context"))
VPP, DEVICES, NODES = "model.virtual_pipeline_model_parallel_size", "trainer.devices", "trainer.num_nodes"
BATCH, MICRO, PROMPTS = "model.global_batch_size", "model.micro_batch_size", "model.opdlm.rollout.num_prompts_per_step"


@pytest.mark.parametrize(
    "layout",
    [
        {DEVICES: 8, TP: 2},
        {DEVICES: 8, NODES: 2, TP: 4, "model.sequence_parallel": True, PP: 2},
        {DEVICES: 4, PP: 2, VPP: 7, CP: 2},
        {DEVICES: 6, CP: 3},
    ],
)
def test_a_layout_that_divides_everything_is_accepted(files: dict[str, str], layout: dict[str, Any]) -> None:
    config = checked(files, **layout)
    validate_architecture(config, QWEN3_0_6B)
    assert config.trainer.world_size == layout[DEVICES] * layout.get(NODES, 1)
    assert config.model.sequence_parallel is layout.get("model.sequence_parallel", False)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (
            {DEVICES: 3, TP: 2},
            "trainer.devices=3 x trainer.num_nodes=1 = 3 ranks must be a multiple of model.tensor_model_parallel_size=2 x "
            "pipeline_model_parallel_size=1 x context_parallel_size=1 = 2; nearest values of trainer.devices that work: 2, 4",
        ),
        (
            {DEVICES: 3, NODES: 2, TP: 2, PP: 2, CP: 2},
            "= 6 ranks must be a multiple of model.tensor_model_parallel_size=2 x pipeline_model_parallel_size=2 x "
            "context_parallel_size=2 = 8; nearest values of trainer.devices that work: 4",
        ),
        (
            {DEVICES: 4, BATCH: 2},
            "model.global_batch_size=2 must be a multiple of micro_batch_size=1 x 4 data-parallel ranks; nearest values "
            "that work: 4",
        ),
        (
            # 24 is a multiple of 8, too, but 128 responses are not one of 24.
            {DEVICES: 8, TP: 2, MICRO: 2, BATCH: 30},
            "micro_batch_size=2 x 4 data-parallel ranks; nearest values that work: 16, 32",
        ),
        (
            # No multiple of 3 divides 128 responses.
            {DEVICES: 3},
            "micro_batch_size=1 x 3 data-parallel ranks; nearest values that work: 6, 9 (if num_prompts_per_step is a "
            "multiple, too)",
        ),
        (
            {BATCH: 12},
            "must be a multiple of model.global_batch_size=12; nearest values of num_prompts_per_step that work: 120, 132",
        ),
        ({DEVICES: 2, VPP: 2}, f"{VPP}=2 needs several pipeline stages, not pipeline_model_parallel_size=1; use null"),
        (
            {DEVICES: 2, PP: 2, "model.num_layers": 5},
            "model.pipeline_model_parallel_size=2 must divide num_layers=5; nearest values that work: 1 (on 2 ranks)",
        ),
    ],
)
def test_ranks_that_do_not_fit_are_refused_with_the_nearest_values(
    files: dict[str, str], layout: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        checked(files, **layout)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("layout", "change", "expected"),
    [
        (
            {DEVICES: 12, TP: 6},
            {},
            "model.tensor_model_parallel_size=6 must divide num_attention_heads=16 and num_query_groups=8 of ar.nemo; "
            "nearest values that work: 4 (on 12 ranks)",
        ),
        (
            {DEVICES: 16, TP: 16},
            {},
            "=16 must divide num_query_groups=8 of ar.nemo; nearest values that work: 8 (on 16 ranks)",
        ),
        (
            # Heads alone would also allow 8.
            {DEVICES: 8, TP: 4},
            {"ffn_hidden_size": 3070},
            "=4 must divide ffn_hidden_size=3070 of ar.nemo; nearest values that work: 2 (on 8 ranks)",
        ),
        # 2 divides the network, but not the ranks.
        ({DEVICES: 3, TP: 3}, {}, "num_query_groups=8 of ar.nemo; nearest values that work: 1 (on 3 ranks)"),
        (
            {DEVICES: 24, PP: 3},
            {},
            "=3 must divide num_layers=28 of ar.nemo; nearest values that work: 2, 4 (on 24 ranks)",
        ),
        (
            {DEVICES: 24, PP: 3, VPP: 7},
            {},
            "=3 x virtual_pipeline_model_parallel_size=7 must divide num_layers=28 of ar.nemo; nearest values that work: 2, 4 (",
        ),
        (
            {DEVICES: 4, PP: 4, VPP: 3},
            {},
            "model.virtual_pipeline_model_parallel_size=3 x pipeline_model_parallel_size=4 must divide num_layers=28 of "
            "ar.nemo; nearest values that work: 7",
        ),
        (
            {DEVICES: 2, PP: 2, VPP: 2},
            {"num_layers": 2},
            "must divide num_layers=2 of ar.nemo; nearest values that work: null",
        ),
    ],
)
def test_a_layout_that_does_not_divide_the_network_is_refused_with_the_nearest_values(
    files: dict[str, str], layout: dict[str, Any], change: dict[str, int], expected: str
) -> None:
    config = checked(files, **{BATCH: 24, PROMPTS: 240, **layout})
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        validate_layout(config, replace(QWEN3_0_6B, **change), "ar.nemo")
    assert "\n" not in str(caught.value)


def test_the_nearest_values_work_and_no_nearer_ones_do(files: dict[str, str]) -> None:
    config = checked(files, **{DEVICES: 24, BATCH: 24, PROMPTS: 240})
    network = replace(QWEN3_0_6B, num_attention_heads=24, num_query_groups=24, ffn_hidden_size=36)

    def refusal(tp: int) -> str | None:
        try:
            validate_layout(replace(config, model=replace(config.model, tensor_model_parallel_size=tp)), network, "x")
        except ValueError as error:
            return str(error)
        return None

    fitting = [tp for tp in range(1, 25) if 24 % tp == 0 and refusal(tp) is None]
    assert fitting == [1, 2, 3, 4, 6, 12]
    for tp in (8, 24):
        nearest = [max(v for v in fitting if v < tp), *[v for v in fitting if v > tp][:1]]
        assert (refusal(tp) or "").endswith(f"that work: {', '.join(map(str, nearest))} (on 24 ranks)")


def test_every_vocabulary_fits_every_layout_by_padding(files: dict[str, str]) -> None:
    config = checked(files, **{DEVICES: 8, TP: 8})
    validate_layout(config, replace(QWEN3_0_6B, vocab_size=151937), "ar.nemo")


TORCHRUN = {"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5", "LOCAL_RANK": "1"}
SLURM = {"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "distil"}


@pytest.mark.parametrize("environment", [TORCHRUN, SLURM], ids=["torchrun", "slurm"])
@pytest.mark.parametrize("devices", [4, "auto", -1])
def test_ranks_are_taken_from_the_launcher(files: dict[str, str], environment: dict[str, str], devices: Any) -> None:
    assert checked(files, environment, **{DEVICES: devices, NODES: 2}).trainer.devices == 4


@pytest.mark.parametrize(
    ("environment", "configured", "expected"),
    [
        (
            {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4"},
            {},
            "trainer.devices=1 x trainer.num_nodes=1 contradicts the launcher's WORLD_SIZE=4: set trainer.devices=4 "
            "trainer.num_nodes=1",
        ),
        (TORCHRUN, {DEVICES: 8}, "WORLD_SIZE=8: set trainer.devices=4 trainer.num_nodes=2"),
        (TORCHRUN, {DEVICES: "auto"}, "trainer.devices='auto' x trainer.num_nodes=1 contradicts"),
        (SLURM, {DEVICES: 4}, "SLURM_NTASKS=8: set trainer.devices=4 trainer.num_nodes=2"),
        (
            {"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"},
            {DEVICES: 2},
            "WORLD_SIZE=1: set trainer.devices=1 trainer.num_nodes=1",
        ),
        ({"WORLD_SIZE": "3", "LOCAL_RANK": "2"}, {DEVICES: 2, NODES: 2}, "set trainer.devices=3 trainer.num_nodes=1"),
        (TORCHRUN | SLURM | {"SLURM_NTASKS": "2"}, {DEVICES: 1, NODES: 2}, "WORLD_SIZE=8"),
    ],
)
def test_another_number_of_processes_than_configured_is_refused(
    files: dict[str, str], environment: dict[str, str], configured: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        checked(files, environment, **configured)


def test_processes_that_lightning_launches_agree_with_their_own_configuration(files: dict[str, str]) -> None:
    launched = {"WORLD_SIZE": "4", "LOCAL_RANK": "1", "NODE_RANK": "1"}
    assert checked(files, launched, **{DEVICES: 2, NODES: 2}).trainer.world_size == 4


@pytest.mark.parametrize(
    "environment",
    [
        SLURM | {"SLURM_JOB_NAME": "interactive"},
        # As some clusters set it for one process of each node, which starts the others.
        {"WORLD_SIZE": "4", "RANK": "0"},
        # As Lightning leaves it behind after a run on one rank.
        {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "NODE_RANK": "0"},
    ],
)
def test_variables_that_count_no_launched_processes_are_ignored(
    files: dict[str, str], environment: dict[str, str]
) -> None:
    assert checked(files, environment, **{DEVICES: 2}).trainer.world_size == 2


@pytest.mark.parametrize("devices", ["auto", -1])
def test_open_devices_without_a_launcher_are_one_on_a_cpu(files: dict[str, str], devices: Any) -> None:
    assert checked(files, **{DEVICES: devices}).trainer.devices == 1


# --- packages -------------------------------------------------------------------------------------------------------


def test_the_apex_of_pypi_is_refused_and_nvidias_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    # Importing it would fail, as with the real one: only its folder may be looked at.
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('pyramid')")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="pip uninstall apex"):
        check_apex()
    (tmp_path / "apex" / "multi_tensor_apply").mkdir()
    check_apex()


# --- the command line -----------------------------------------------------------------------------------------------


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", str(REPOSITORY / "examples" / "train_opdlm.py"), *arguments],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_cfg_job_shows_every_key_and_takes_overrides_without_plus() -> None:
    shown = run_script("model.opdlm.block_size=8", "--cfg", "job", "trainer.max_steps=3")
    assert shown.returncode == 0, shown.stderr
    config = parse(OmegaConf.create(shown.stdout))
    assert (config.model.opdlm.block_size, config.trainer.max_steps) == (8, 3)
    leaves = {key.rpartition(".")[2] for key in full_keys(Config)}
    assert all(f"{leaf}:" in shown.stdout for leaf in leaves)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("model.opdlm.blok_size=8", "model.opdlm.blok_size is not a key of this configuration; did you mean"),
        ("+model.opdlm.blok_size=8", "model.opdlm.blok_size is not a key of this configuration; did you mean"),
        ("model.opdlm.block_size=0", "model.opdlm.block_size=0 must be from 1 to 64"),
        ("+experiment=nothing", "experiment='nothing' must be one of 'block_size_curriculum'"),
        ("model.optim.lr=[1", "cannot read the override 'model.optim.lr=[1'"),
        ("--config-name=nothing", "Cannot find primary config 'nothing'"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_and_exit_code_2(argument: str, expected: str) -> None:
    run = run_script(argument)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1 and run.stderr.startswith("error: ") and expected in run.stderr


def test_the_traceback_of_a_mistake_can_be_asked_for() -> None:
    run = run_script("model.opdlm.block_size=0", HYDRA_FULL_ERROR="1")
    assert run.returncode == 1 and "Traceback" in run.stderr and "must be from 1 to 64" in run.stderr


def test_users_own_file_needs_no_schema_line(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("trainer: {max_steps: 5}\nmodel: {opdlm: {block_size: 65}}\n", encoding="utf-8")
    own = ("--config-path", str(tmp_path), "--config-name", "mine")
    assert "model.opdlm.block_size=65 must be from 1 to 64" in run_script(*own).stderr
    assert "write +model.seed=..." in run_script(*own, "model.seed=3").stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.yaml"]
