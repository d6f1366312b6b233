"""Checks across keys. Every refusal is one line that names the key, its value and the rule."""

import ast
import difflib
import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from nemo_opdlm.config.architecture import Architecture
from nemo_opdlm.config.exp_manager import ExpManagerConfig
from nemo_opdlm.config.layout import check_layout, settle_ranks, validate_layout
from nemo_opdlm.config.precision import check_fp8_sizes, check_precision, find_machine
from nemo_opdlm.config.reader import to_container
from nemo_opdlm.config.rules import FIXED, NOT_AVAILABLE, OWN_KEYS, RANGES
from nemo_opdlm.config.schema import Config
from nemo_opdlm.data.shown import plain, shown

_logger = logging.getLogger(__name__)
#: The published recipe saves every 10 rollout steps.
_ROLLOUTS_PER_CHECKPOINT = 10


def validate(config: Config, *, check_files: bool = True, environment: Mapping[str, str] = os.environ) -> Config:
    """Check a configuration before any model is built, and return it with the corrections that are logged.

    Args:
        config: as read by `parse`.
        check_files: whether what a run reads must be given and exist.
        environment: where a launcher has counted its processes.

    Raises:
        ValueError: a value is out of range, not available, or contradicts another.
        FileNotFoundError: a path does not exist.
    """
    check_apex()
    for key, (accepts, rule) in RANGES.items():
        value = _get(config, key)
        if value is not None and not accepts(value):
            raise ValueError(f"{key}={shown(to_container(value))} must be {rule}")
    for key, (only, why) in FIXED.items():
        if _get(config, key) != only:
            raise ValueError(f"{key}={shown(_get(config, key))} must be {only!r}: {why}")
    for key, choice, instead in NOT_AVAILABLE:
        if _get(config, key) == choice:
            raise ValueError(f"{key}={choice!r} is not available yet; {instead}")
    config = settle_ranks(config, environment)
    for check in (
        _method,
        _rollout,
        check_layout,
        _transformer,
        check_precision,
        _recomputation,
        _optim,
        _exp_manager,
        _data,
    ):
        check(config)
    if check_files:
        _files(config)
    return _corrected(config)


def validate_architecture(config: Config, arch: Architecture) -> None:
    """Check a configuration against the network it will train, once its architecture is known.

    Raises:
        ValueError: the layout does not divide the network, a token id lies outside its vocabulary, a sequence would not
            fit, or an architecture key of the configuration contradicts the network.
    """
    model, opdlm = config.model, config.model.opdlm
    for name, value in vars(arch).items():
        wanted = getattr(model, name)
        if wanted is not None and wanted != value:
            raise ValueError(f"model.{name}={wanted!r} contradicts {value!r} of {model.restore_from_path}")
    validate_layout(config, arch, model.restore_from_path)
    check_fp8_sizes(config, arch)
    for key, token_id in (
        ("model.opdlm.mask_token_id", opdlm.mask_token_id),
        ("model.opdlm.rollout.end_token_ids", max(opdlm.rollout.end_token_ids or (), default=None)),
    ):
        if token_id is not None and token_id >= arch.vocab_size:
            raise ValueError(f"{key}={token_id} lies outside the vocabulary of {arch.vocab_size} tokens")
    if opdlm.divergence_top_k > arch.vocab_size:
        raise ValueError(
            f"model.opdlm.divergence_top_k={opdlm.divergence_top_k} exceeds the vocabulary of {arch.vocab_size} tokens"
        )
    _context_length(config, arch.max_position_embeddings)


def check_apex() -> None:
    """Refuse PyPI's `apex`, a web toolkit that shares NVIDIA Apex's name and breaks the imports of NeMo and Megatron.

    Raises:
        ValueError: an `apex` without NVIDIA's parts is installed.
    """
    spec = importlib.util.find_spec("apex")
    if spec is None or importlib.util.find_spec("amp_C") is not None:
        return
    if not any((Path(folder) / "multi_tensor_apply").is_dir() for folder in spec.submodule_search_locations or ()):
        raise ValueError("the `apex` on PyPI is not NVIDIA Apex: pip uninstall apex")


def _get(config: Config, key: str) -> Any:
    return reduce(getattr, key.split("."), config)


def _method(config: Config) -> None:
    opdlm = config.model.opdlm
    if opdlm.divergence == "nll" and opdlm.divergence_top_k:
        raise ValueError(
            f"model.opdlm.divergence_top_k={opdlm.divergence_top_k} contradicts divergence='nll', which looks at no "
            "teacher; set divergence_top_k=0"
        )
    if opdlm.tail != "tail_bucket" and not opdlm.divergence_top_k:
        raise ValueError(
            f"model.opdlm.tail={opdlm.tail!r} contradicts divergence_top_k=0: the full vocabulary has no tail; "
            "set model.opdlm.divergence_top_k, e.g. to 16"
        )
    if opdlm.tail == "partial" and opdlm.divergence in ("reverse_kl", "mixed"):
        _logger.warning(
            "model.opdlm.tail='partial' with divergence=%r does not have the teacher as its optimum: probability leaks "
            "out of the teacher's top tokens at no cost. Use tail='tail_bucket'.",
            opdlm.divergence,
        )
    if opdlm.responses != "student" and opdlm.state_selection != "random_mask":
        raise ValueError(
            f"model.opdlm.state_selection={opdlm.state_selection!r} contradicts responses={opdlm.responses!r}: only "
            "the student's own responses have denoising states; use 'random_mask'"
        )
    if opdlm.state_selection == "all_states" and opdlm.states_per_rollout != 1:
        raise ValueError(
            f"model.opdlm.states_per_rollout={opdlm.states_per_rollout} contradicts state_selection='all_states', "
            "which takes every state; set states_per_rollout=1"
        )
    if opdlm.attention == "flex" and find_machine(config.trainer.accelerator).capability is None:
        raise ValueError(
            "model.opdlm.attention='flex' needs a GPU: FlexAttention has no backward pass on a CPU; use 'auto' or 'sdpa'"
        )
    if opdlm.divergence == "nll" and opdlm.responses == "student":
        _logger.warning("model.opdlm.divergence='nll' on responses='student' learns nothing from the teacher.")


def _rollout(config: Config) -> None:
    opdlm, rollout = config.model.opdlm, config.model.opdlm.rollout
    if rollout.cuda_graphs is True:
        for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
            if (size := getattr(config.model, key)) > 1:
                raise ValueError(
                    f"model.opdlm.rollout.cuda_graphs=True contradicts model.{key}={size}: a graph holds a whole network; "
                    "use 'auto' or False"
                )
        if find_machine(config.trainer.accelerator).capability is None:
            raise ValueError("model.opdlm.rollout.cuda_graphs=True needs a GPU; use 'auto' or False")
    if not 1 <= opdlm.denoising_steps <= opdlm.block_size:
        raise ValueError(
            f"model.opdlm.rollout.denoising_steps={rollout.denoising_steps} must be from 1 to "
            f"block_size={opdlm.block_size}: every forward reveals at least one token of a block"
        )
    schedule = rollout.max_new_tokens_schedule
    if schedule.type is None and rollout.max_new_tokens is None:
        raise ValueError(
            "model.opdlm.rollout.max_new_tokens=None must be given where max_new_tokens_schedule.type is null"
        )
    if schedule.type is not None and schedule.end < schedule.start:
        raise ValueError(
            f"model.opdlm.rollout.max_new_tokens_schedule.end={schedule.end} must be at least start={schedule.start}"
        )


def _transformer(config: Config) -> None:
    extra, key = config.model.mcore_customization_config, "model.mcore_customization_config"
    known = _transformer_config_fields() if extra else set()
    for name in extra:
        own = OWN_KEYS.get(name, name)
        if hasattr(config.model, own):
            raise ValueError(f"{key}.{plain(str(name))}={shown(extra[name])} has a key of its own: model.{own}")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            given = f"{key}.{plain(str(name))}={shown(extra[name])}"
            raise ValueError(f"{given} is not a field of Megatron's TransformerConfig{hint}")


def _transformer_config_fields() -> set[str]:
    """Read off the source: importing Megatron takes seconds."""
    spec = importlib.util.find_spec("megatron")
    assert spec is not None and spec.submodule_search_locations is not None
    core = next(Path(folder, "core") for folder in spec.submodule_search_locations if Path(folder, "core").is_dir())
    bodies = [
        node.body
        for file in (core / "model_parallel_config.py", core / "transformer" / "transformer_config.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and node.name in ("ModelParallelConfig", "TransformerConfig")
    ]
    return {
        item.target.id
        for body in bodies
        for item in body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def _optim(config: Config) -> None:
    optim, sched = config.model.optim, config.model.optim.sched
    if config.trainer.max_steps is None:
        raise ValueError("trainer.max_steps=None must be given: the number of optimizer steps of the run")
    if optim.overlap_param_sync and not (optim.distributed and optim.overlap_grad_sync):
        raise ValueError(
            f"model.optim.overlap_param_sync=True needs model.optim.overlap_grad_sync={optim.overlap_grad_sync} to be True "
            f"and model.optim.name={optim.name!r} to be 'distributed_fused_adam'"
        )
    if sched.min_lr > optim.lr:
        raise ValueError(f"model.optim.sched.min_lr={sched.min_lr} must be at most model.optim.lr={optim.lr}")
    horizon = config.trainer.max_steps if sched.max_steps is None else sched.max_steps
    if sched.warmup_steps >= horizon:
        name = "trainer.max_steps" if sched.max_steps is None else "model.optim.sched.max_steps"
        raise ValueError(
            f"model.optim.sched.warmup_steps={sched.warmup_steps} must be below {name}={horizon}: "
            "otherwise the learning rate never reaches model.optim.lr"
        )


def _recomputation(config: Config) -> None:
    model, prefix = config.model, "model.activations_checkpoint_"
    granularity, method = model.activations_checkpoint_granularity, model.activations_checkpoint_method
    layers = model.activations_checkpoint_num_layers
    if granularity == "full" and (method is None or layers is None):
        missing = "method" if method is None else "num_layers"
        raise ValueError(f"{prefix}granularity='full' needs {prefix}{missing}")
    if granularity != "full" and (method is not None or layers is not None):
        extra, value = ("method", method) if method is not None else ("num_layers", layers)
        raise ValueError(f"{prefix}{extra}={value!r} needs {prefix}granularity='full'")


def _exp_manager(config: Config) -> None:
    manager, key = config.exp_manager, "exp_manager.checkpoint_callback_params"
    params = manager.checkpoint_callback_params
    if params.monitor is None:
        raise ValueError(f"{key}.monitor=None must name a logged metric, e.g. 'val_loss' or 'reduced_train_loss'")
    _wandb(manager)
    if params.always_save_nemo and config.model.model_parallel_size > 1:
        raise ValueError(
            f"{key}.always_save_nemo=True is not possible with TP x PP x CP = {config.model.model_parallel_size} > 1; use "
            "False: save_nemo_on_train_end writes the .nemo file once, in every layout"
        )
    if config.model.dist_ckpt_async_save and params.save_last_n_optim_states >= 0:
        raise ValueError(
            f"{key}.save_last_n_optim_states={params.save_last_n_optim_states} contradicts "
            "model.dist_ckpt_async_save=True: optimizer states are dropped from checkpoints that must be there at once"
        )
    if manager.create_checkpoint_callback and manager.resume_if_exists and not params.save_last:
        _logger.warning("%s.save_last=False: a run that is interrupted starts again from the beginning.", key)
    intervals = {
        name: getattr(params, name)
        for name in ("every_n_epochs", "every_n_train_steps", "train_time_interval")
        if getattr(params, name) is not None
    }
    if len(intervals) > 1:
        given = ", ".join(f"{key}.{name}={value!r}" for name, value in intervals.items())
        raise ValueError(f"only one of {given} may be given")


def _wandb(manager: ExpManagerConfig) -> None:
    if not manager.create_wandb_logger:
        return
    if not {"name", "project"} & set(manager.wandb_logger_kwargs or {}):
        raise ValueError(
            "exp_manager.create_wandb_logger=True needs a project: exp_manager.wandb_logger_kwargs={project: NAME}, with "
            "offline: true where there is no network"
        )
    if importlib.util.find_spec("wandb") is None:
        raise ValueError("exp_manager.create_wandb_logger=True needs the package wandb: pip install wandb")


def _data(config: Config) -> None:
    for name in ("train_ds", "validation_ds"):
        prompts, key = getattr(config.model.data, name), f"model.data.{name}"
        cut, longest = prompts.truncate_prompt_to, prompts.max_prompt_length
        if cut is not None and not 1 <= cut <= longest:
            raise ValueError(f"{key}.truncate_prompt_to={cut} must be from 1 to max_prompt_length={longest}")
        if cut is not None and (prompts.chat_template is True or prompts.domain_suffixes):
            raise ValueError(f"{key}.truncate_prompt_to={cut} would cut off the chat template's end or a domain suffix")
        if cut is not None and name == "train_ds" and not config.model.opdlm.generates:
            raise ValueError(f"{key}.truncate_prompt_to={cut} would cut a prompt off from its response; use null")
    if config.model.max_position_embeddings is not None:
        _context_length(config, config.model.max_position_embeddings)


def _context_length(config: Config, available: int) -> None:
    validation = config.model.data.validation_ds
    # Training responses are cut where the context ends; a prompt must leave room for one block.
    for name, prompts, response in (
        ("train_ds", config.model.data.train_ds, config.model.opdlm.block_size),
        ("validation_ds", validation, validation.response_length),
    ):
        longest = prompts.truncate_prompt_to or prompts.max_prompt_length
        if prompts.file_path is not None and longest + response > available:
            raise ValueError(
                f"model.data.{name}.max_prompt_length={longest} and a response of {response} tokens do not fit "
                f"max_position_embeddings={available}, the model's context"
            )


def _files(config: Config) -> None:
    model = config.model
    if model.restore_from_path is None:
        raise ValueError(
            "model.restore_from_path=None must be given: a .nemo file, or a Hugging Face, NeMo 2.0 or Megatron-Bridge folder"
        )
    if model.data.train_ds.file_path is None:
        raise ValueError("model.data.train_ds.file_path=None must be given: a jsonl or parquet file of prompts")
    for key in ("model.restore_from_path", "model.kd_teacher_restore_from_path", "model.tokenizer.type"):
        _exists(config, key)
    for key in ("model.data.train_ds.file_path", "model.data.validation_ds.file_path"):
        _exists(config, key)
        path = _get(config, key)
        if path is not None and Path(path).is_dir():
            raise ValueError(f"{key}={path!r} must be a file, not a folder")
    _exists(config, "exp_manager.resume_from_checkpoint")


def _exists(config: Config, key: str) -> None:
    check_exists(key, _get(config, key))


def check_exists(key: str, path: str | None) -> None:
    """Check that a file or folder that a key names is there.

    Raises:
        OSError: it is not, or nobody can tell.
    """
    try:
        exists = path is None or Path(path).exists()
    except OSError as error:  # e.g. a name that is too long, or a folder that may not be read
        raise OSError(f"{key}={shown(path)}: {error.strerror}") from error
    if not exists:
        raise FileNotFoundError(f"{key}={shown(path)} does not exist")


def _corrected(config: Config) -> Config:
    model, manager = config.model, config.exp_manager
    if model.sequence_parallel and model.tensor_model_parallel_size == 1:
        _logger.info("model.sequence_parallel is switched off: it needs tensor_model_parallel_size above 1.")
        model = replace(model, sequence_parallel=False)
    if model.ub_tp_comm_overlap and not model.sequence_parallel:
        _logger.info("model.ub_tp_comm_overlap is switched off: it needs model.sequence_parallel.")
        model = replace(model, ub_tp_comm_overlap=False)
    params = manager.checkpoint_callback_params
    if params.monitor == "val_loss" and model.data.validation_ds.file_path is None:
        _logger.info("exp_manager monitors reduced_train_loss: without model.data.validation_ds there is no val_loss.")
        params = replace(params, monitor="reduced_train_loss")
    is_validated = model.data.validation_ds.file_path is not None and config.trainer.val_check_interval is not None
    if not (is_validated or params.every_n_train_steps or params.train_time_interval):
        # Checkpoints follow validations; without any, nothing would be saved before the end of the run.
        steps = _ROLLOUTS_PER_CHECKPOINT * model.updates_per_rollout
        _logger.info("exp_manager saves a checkpoint every %d steps: there is no validation to follow.", steps)
        params = replace(params, every_n_train_steps=steps)
    return replace(config, model=model, exp_manager=replace(manager, checkpoint_callback_params=params))
