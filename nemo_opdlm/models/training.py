"""A run from its checked configuration: archive, prompts, model, teacher, trainer."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from nemo.utils import logging
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from nemo_opdlm.config import (
    Architecture,
    Config,
    ExpManagerConfig,
    ModelConfig,
    PromptFileConfig,
    to_container,
    validate_architecture,
    validate_layout,
)
from nemo_opdlm.data.prompts import PromptDataset, load_prompts
from nemo_opdlm.data.tokenizer import load_tokenizer
from nemo_opdlm.diffusion.layout import BlockLayout
from nemo_opdlm.lightning.callbacks import StepProgressBar
from nemo_opdlm.lightning.loggers import finished_loggers
from nemo_opdlm.lightning.resume import finish_experiment, start_experiment
from nemo_opdlm.lightning.samples import SampleLog
from nemo_opdlm.lightning.strategy import MegatronStrategy
from nemo_opdlm.megatron import flex
from nemo_opdlm.megatron.atomic_folder import on_rank_zero
from nemo_opdlm.megatron.cpu import wants_cpu
from nemo_opdlm.megatron.failure import shared_failures
from nemo_opdlm.megatron.forward import parts_of_a_row
from nemo_opdlm.megatron.rollout import slots_that_fit
from nemo_opdlm.megatron.step import pack_capacity
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.models.archive import opened_once, restore_opened
from nemo_opdlm.models.archive_format import (
    Archive,
    check_class,
    check_target,
    existing,
    is_trained,
    read_archive_config,
)
from nemo_opdlm.models.conversion import archive_architecture, read_weights
from nemo_opdlm.models.foreign import Kind, recognise
from nemo_opdlm.models.method import Method, SpecialTokens
from nemo_opdlm.models.opdlm_model import OPDLMModel
from nemo_opdlm.models.safe_tar import ArchiveError
from nemo_opdlm.models.settings import teacher_options, teacher_rows, token_multiple


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads besides weights, checked before a model is built.

    Attributes:
        config: the configuration with the archive's architecture filled in.
        origin: where the model was converted from, for its export.
        tokens: special tokens.
        train, heldout: prompts; None where the configuration names no file.
    """

    config: Config
    origin: dict[str, Any]
    tokens: SpecialTokens
    train: PromptDataset | None
    heldout: PromptDataset | None


def train(config: Config, callbacks: Sequence[Callback] = ()) -> OPDLMModel:
    """Train from start or resume; returns the trained model.

    Args:
        config: checked.
        callbacks: of Lightning, beside those of every run and ahead of the one that saves checkpoints.

    Raises:
        ValueError, OSError: bad input; one line, before any work is done.
        RankFailure: another rank failed.
    """
    _check_layout_early(config)
    trainer = _trainer(config, callbacks)
    assert isinstance(trainer.strategy, MegatronStrategy)
    trainer.strategy.start(trainer)
    with shared_failures():
        # Weights are read before anything is written: an archive that does not fit leaves the log folder as it is.
        model, config = restore(config, trainer)
        manager = _named(config)
        try:
            log_dir = start_experiment(trainer, to_container(manager))
        except OSError as error:
            folder = manager.explicit_log_dir or manager.exp_dir or "nemo_experiments"
            raise OSError(f"exp_manager cannot write to {folder}: {error}") from error
        if (every := config.model.log_samples_every_n_steps) is not None:
            # Ahead of the checkpoint callback, as the metrics are.
            trainer.callbacks.insert(0, SampleLog(log_dir, every, config.model.num_logged_samples))  # type: ignore[attr-defined]
        logging.info(f"Experiment configuration\n{OmegaConf.to_yaml(OmegaConf.create(to_container(config)))}")
        with _one_line_os_errors(), finished_loggers(trainer):
            trainer.fit(model)
            finish_experiment(trainer, model)
    return model


@contextmanager
def _one_line_os_errors() -> Iterator[None]:
    """Say where a file of NeMo's or Lightning's cannot be written; those of ours say so themselves."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            raise
        raise OSError(f"the run cannot go on: {error.strerror}: {error.filename}") from error


def restore(config: Config, trainer: Trainer | None = None) -> tuple[OPDLMModel, Config]:
    """The student with its weights, prompts and teacher, and the configuration with the archive's settings filled in.

    Each checkpoint is opened once, by the first rank. All of them are checked before a model is built.

    Raises:
        ValueError, OSError: one line naming file, row or key.
    """
    model = config.model
    student_path, teacher_path = str(model.restore_from_path), str(model.teacher_path)
    with ExitStack() as stack:
        archive = stack.enter_context(opened_once(student_path, model.tokenizer.type))
        teacher_archive = archive
        if teacher_path != student_path:
            teacher_archive = stack.enter_context(opened_once(teacher_path, model.tokenizer.type))
        inputs = on_rank_zero(lambda: _read_inputs(config, archive, teacher_archive))
        student: OPDLMModel = restore_opened(OPDLMModel, archive, _model_config(inputs), trainer)
        if inputs.train is not None or inputs.heldout is not None:
            student.use_prompts(inputs.tokens, inputs.train, inputs.heldout)
        if model.has_teacher:
            student.use_teacher(_teacher(inputs.config, student, teacher_archive))
    return student, inputs.config


def _check_layout_early(config: Config) -> None:
    """Check the layout before processes are started: our archives tell what they hold without being unpacked."""
    for path in (config.model.restore_from_path, config.model.teacher_path):
        if recognise(existing(str(path))) is Kind.OURS:
            settings = read_archive_config(str(path))
            check_target(path, settings)
            validate_layout(config, archive_architecture(Path(str(path)), settings), path)


def _read_inputs(config: Config, archive: Archive, teacher: Archive) -> Inputs:
    """Read settings, tokenizer and prompts, and check the layout against both networks."""
    check_class(archive)
    arch = archive_architecture(archive, archive.config).padded_to(config.model.make_vocab_size_divisible_by)
    validate_architecture(config, arch)
    _check_teacher(config, arch, teacher)
    config = _with_archive(config, archive, arch)
    tokenizer_type = config.model.tokenizer.type
    folder = Path(tokenizer_type) if tokenizer_type else archive.tokenizer
    if folder is None:
        raise ArchiveError(f"{archive.source}: the archive holds no tokenizer: set model.tokenizer.type to a folder")
    tokenizer = load_tokenizer(folder, trust_remote_code=config.model.tokenizer.trust_remote_code)
    data, origin = config.model.data, dict(archive.config.get("origin") or {})
    opdlm = config.model.opdlm
    assert opdlm.mask_token_id is not None
    tokens = SpecialTokens.read(tokenizer, arch.vocab_size, opdlm.mask_token_id, opdlm.rollout.end_token_ids, origin)
    train = _prompts(data.train_ds, tokenizer, tokens, with_responses=not opdlm.generates)
    heldout = _prompts(data.validation_ds, tokenizer, tokens)
    _check_lengths(config, tokens, train, heldout)
    return Inputs(config, origin, tokens, train, heldout)


def _check_lengths(
    config: Config, tokens: SpecialTokens, train: PromptDataset | None, heldout: PromptDataset | None
) -> None:
    """Whether the longest rows fit; before the first rollout, as the length curriculum may reach them only after days."""
    model, max_steps = config.model, config.trainer.max_steps
    assert model.max_position_embeddings is not None and max_steps is not None
    method = Method.of(model, tokens, model.max_position_embeddings, max_steps)
    if train is not None:
        limits = method.longest_responses(train.prompt_len, list(train.domains))
        if train.responses is None:
            _check_cache(model, train.prompt_len, limits, model.opdlm.block_size)
        else:
            limits = torch.minimum(limits, train.responses.lengths)
        _check_packs(model, train.prompt_len, limits)
    if heldout is not None:
        validation = model.data.validation_ds
        prompt_len = heldout.prompt_len[: validation.num_samples]
        # The teacher writes the answers, token by token; their states are not packed.
        _check_cache(model, prompt_len, torch.full_like(prompt_len, validation.response_length), 1)


def _check_cache(model: ModelConfig, prompt_len: Tensor, limits: Tensor, block_size: int) -> None:
    max_batch_tokens = model.opdlm.rollout.max_batch_tokens
    if max_batch_tokens is None:
        return
    assert model.kv_channels is not None
    longest = -(-int((prompt_len + limits).max()) // block_size) * block_size
    if flex.is_used(model.opdlm.attention, not wants_cpu(), model.kv_channels):
        longest = flex.bucket(longest)
    slots_that_fit(max_batch_tokens, model.pipeline_model_parallel_size, longest)


def _check_packs(model: ModelConfig, prompt_len: Tensor, limits: Tensor) -> None:
    pack_to_tokens, opdlm = model.opdlm.pack_to_tokens, model.opdlm
    if pack_to_tokens is None:
        return
    num_states = torch.full_like(prompt_len, opdlm.max_states_per_rollout)
    row_len = BlockLayout(prompt_len, limits, num_states, opdlm.block_size).row_len
    row_len = row_len + (prompt_len + limits) * (opdlm.ar_loss_weight > 0)
    tensor_parts = model.tensor_model_parallel_size if model.sequence_parallel else 1
    multiple_of = token_multiple(model) * tensor_parts * parts_of_a_row(model.context_parallel_size)
    pack_capacity(pack_to_tokens, int(row_len.max()), multiple_of)


def _check_teacher(config: Config, student: Architecture, archive: Archive) -> None:
    check_class(archive)
    model = config.model
    if model.has_teacher and model.kd_teacher_restore_from_path is None and is_trained(archive.config):
        raise ArchiveError(
            f"model.kd_teacher_restore_from_path=None must be given: {archive.source} is a trained student, which would be "
            "its own teacher; name the AR model that it came from"
        )
    arch = archive_architecture(archive, archive.config)
    if arch.vocab_size != student.vocab_size:
        raise ArchiveError(
            f"{archive.source}: the teacher has {arch.vocab_size} vocabulary rows, the student {student.vocab_size}: they "
            "must have the same vocabulary"
        )
    validate_layout(config, arch, config.model.teacher_path)


def _named(config: Config) -> ExpManagerConfig:
    """The experiment manager's settings with names: NeMo's own name of a checkpoint would say its epoch, not its step."""
    manager = config.exp_manager
    name, params = manager.name or config.name, manager.checkpoint_callback_params
    filename = params.filename or f"{name}--{{{params.monitor}:.4f}}-{{step}}"
    return replace(manager, name=name, checkpoint_callback_params=replace(params, filename=filename))


def _with_archive(config: Config, archive: Archive, arch: Architecture) -> Config:
    """Fill in what the archive knows: the architecture and, where the configuration leaves it open, the mask token."""
    opdlm = config.model.opdlm
    if opdlm.mask_token_id is None:
        stored = (archive.config.get("opdlm") or {}).get("mask_token_id")
        if stored is None:
            raise ArchiveError(f"{archive.source}: the archive names no mask token: set model.opdlm.mask_token_id")
        opdlm = replace(opdlm, mask_token_id=int(stored))
    shape = {field.name: getattr(arch, field.name) for field in fields(Architecture)}
    return replace(config, model=replace(config.model, opdlm=opdlm, **shape))


def _prompts(
    data: PromptFileConfig, tokenizer: Any, tokens: SpecialTokens, *, with_responses: bool = False
) -> PromptDataset | None:
    if data.file_path is None:
        return None
    prompts = load_prompts(
        data.file_path,
        tokenizer=tokenizer,
        max_prompt_length=data.max_prompt_length,
        chat_template=data.chat_template,
        enable_thinking=data.enable_thinking,
        domain_suffixes=data.domain_suffixes,
        truncate_prompt_to=data.truncate_prompt_to,
        mask_token_id=tokens.mask_token_id,
        response_end_ids=tokens.end_token_ids if with_responses else None,
    )
    logging.info(f"{data.file_path}: {len(prompts)} prompts, {prompts.num_dropped_too_long} dropped as too long")
    return prompts


def _model_config(inputs: Inputs) -> DictConfig:
    """The ``model`` section as the model instance keeps it, with what it needs of ``trainer``."""
    config = inputs.config
    section: dict[str, Any] = to_container(config.model)
    section["precision"] = config.trainer.precision
    section["gradient_clip_val"] = config.trainer.gradient_clip_val
    section["origin"] = inputs.origin
    return OmegaConf.create(section)


def _teacher(config: Config, model: OPDLMModel, archive: Archive) -> Teacher:
    """The frozen AR model: ``kd_teacher_restore_from_path``, by default the weights that the student starts from."""
    arch = archive_architecture(archive, archive.config).padded_to(model.arch.make_vocab_size_divisible_by)
    options = teacher_options(config.model, model.options)
    teacher = Teacher(arch, model.parallel, options, teacher_rows(config.model), config.model.opdlm.pack_to_tokens)
    read_weights(teacher.network, archive)
    if config.model.opdlm.teacher.offload:
        teacher.network.offload()
    return teacher


def _trainer(config: Config, more_callbacks: Sequence[Callback]) -> Trainer:
    model = config.model
    strategy = MegatronStrategy(
        tensor_model_parallel_size=model.tensor_model_parallel_size,
        pipeline_model_parallel_size=model.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=model.virtual_pipeline_model_parallel_size,
        context_parallel_size=model.context_parallel_size,
        seed=model.seed,
        timeout_minutes=model.distributed_timeout_minutes,
        async_save=model.dist_ckpt_async_save,
    )
    # Consumed elsewhere: precision by the model, clipping by Megatron's optimizer.
    settings = {
        key: value
        for key, value in to_container(config.trainer).items()
        if value is not None and key not in ("precision", "gradient_clip_val")
    }
    # None here means: count validations in updates, across epochs.
    settings["check_val_every_n_epoch"] = config.trainer.check_val_every_n_epoch
    if config.trainer.val_check_interval is None or model.data.validation_ds.file_path is None:
        settings["limit_val_batches"] = 0
    progress = [StepProgressBar()] if settings.get("enable_progress_bar", True) else []
    return Trainer(strategy=strategy, callbacks=[*progress, *more_callbacks], **settings)
