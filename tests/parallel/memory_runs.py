"""One rollout step of random networks in which every row is as long as it may be: what the ranks of `test_memory_plan` run."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from nemo_opdlm import cli
from nemo_opdlm.config import Architecture, Config, ModelConfig, parse, validate
from nemo_opdlm.data.prompts import PromptDataset
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.megatron import parallel
from nemo_opdlm.megatron.optimizer import StudentOptimizer, wrap
from nemo_opdlm.megatron.student import StagedGPT, build_model
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.models.distiller import OnPolicyDistiller, RolloutBatch
from nemo_opdlm.models.method import Method, SpecialTokens
from nemo_opdlm.models.settings import model_options, optimizer_settings, teacher_options, teacher_rows
from nemo_opdlm.testing.memory import AllocationProfile

#: Tokens of a response end only where it is cut, and one forward reveals a whole block: all of them are supervised.
KEYS = (
    "trainer.accelerator=cpu",
    "trainer.max_steps=100",
    "model.micro_batch_size=2",
    "model.global_batch_size=4",
    "model.data.train_ds.file_path=prompts.jsonl",
    "model.data.train_ds.max_prompt_length=32",
    "model.opdlm.rollout.num_prompts_per_step=8",
    "model.opdlm.rollout.max_new_tokens=64",
    "model.opdlm.rollout.max_new_tokens_schedule.type=null",
    "model.opdlm.rollout.remasking=low_confidence_static",
    "model.opdlm.rollout.denoising_steps=1",
)


def configure(*overrides: str) -> Config:
    """The checked configuration of a run whose files need not exist."""
    config = parse(cli.compose("gpt_opdlm", [*KEYS, *overrides]), Config)
    return validate(config, check_files=False, environment={})


def measure(arch: Architecture, overrides: tuple[str, ...]) -> dict[str, int]:
    """Bytes of what this rank holds all the time, and the most that each phase of a rollout step allocates beside it."""
    config = configure(*overrides)
    distiller = build(config, arch)
    distiller.update(0)  # at the first update the optimizer makes its state
    held = {name: _nbytes(tensors) for name, tensors in _held(distiller).items()}
    with AllocationProfile() as rollout:
        trajectory = distiller.roll_out(1, {})
    states = distiller.select_states(1, trajectory, 0)
    with AllocationProfile() as teacher:
        share = distiller.share_out(trajectory, states, {})
    batch = RolloutBatch(1, 0, trajectory, states, share)
    held["targets"] = _nbytes(_tensors(batch.share.targets))
    held["records"] = sum(_nbytes(_tensors(part)) for part in (trajectory, states, share.trajectory, share.states))
    metrics: dict[str, float] = {}
    with AllocationProfile() as update:
        distiller.accumulate_gradients(batch, 0, metrics)
    with AllocationProfile() as step:
        distiller.take_step(metrics)
    profiles = {"rollout": rollout, "teacher pass": teacher, "passes": update, "step": step}
    return held | {name: profile.peak_bytes for name, profile in profiles.items()}


def build(config: Config, arch: Architecture) -> OnPolicyDistiller:
    """A run's parts with random weights, as `models.training` makes them."""
    model, max_steps = config.model, config.trainer.max_steps
    assert max_steps is not None
    parallel.destroy()
    context = parallel.initialize(
        model.tensor_model_parallel_size,
        model.pipeline_model_parallel_size,
        model.virtual_pipeline_model_parallel_size,
        model.context_parallel_size,
    )
    options = model_options(model, config.trainer.precision)
    settings = optimizer_settings(model, max_steps, config.trainer.gradient_clip_val)
    student = _with_random_weights(build_model(arch, context, AttentionRule.BLOCK_DIFFUSION, options))
    packed = model.opdlm.pack_to_tokens
    teacher = Teacher(arch, context, teacher_options(model, options), teacher_rows(model), packed)
    _with_random_weights(teacher.network)
    network = wrap(student, settings)
    optimizer = StudentOptimizer(network, settings)
    method = Method.of(model, _special_tokens(arch.vocab_size), arch.max_position_embeddings, max_steps)
    return OnPolicyDistiller(model, method, network, optimizer, teacher, _prompts(model))


def _with_random_weights(network: StagedGPT) -> StagedGPT:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(mean=1.0 if parameter.ndim == 1 else 0.0, std=0.02)
    return network


def _special_tokens(vocab_size: int) -> SpecialTokens:
    """No token that is ever proposed ends a response."""
    mask_token_id, end_token_id = vocab_size - 1, vocab_size - 2
    return SpecialTokens(mask_token_id, 0, (end_token_id,), torch.arange(vocab_size) >= end_token_id)


def _prompts(model: ModelConfig) -> PromptDataset:
    count, length = model.opdlm.rollout.num_prompts_per_step, model.data.train_ds.max_prompt_length
    names = tuple(map(str, range(count)))
    return PromptDataset(
        torch.arange(count * length), torch.arange(count + 1) * length, names, (None,) * count, 0, False
    )


def _held(distiller: OnPolicyDistiller) -> dict[str, list[Tensor]]:
    network, megatron, teacher = distiller.student, distiller.optimizer.megatron, distiller.teacher
    assert teacher is not None
    parts: list[Any] = getattr(megatron, "chained_optimizers", [megatron])
    moments = [value for part in parts for state in part.optimizer.state.values() for value in state.values()]
    masters = [x for part in parts for group in getattr(part, "fp32_from_float16_groups", []) for x in group]
    return {
        "parameters": list(network.model.parameters()),
        "gradients": [buffer.grad_data for chunk in network.ddp for buffer in chunk.buffers],
        "optimizer": masters + moments,
        "teacher": list(teacher.network.parameters()),
    }


def _tensors(record: object) -> Iterator[Tensor]:
    """Tensors of a record and of the records in it, but for networks."""
    for value in vars(record).values():
        if isinstance(value, Tensor):
            yield value
        elif type(value).__module__.startswith("nemo_opdlm.distillation"):
            yield from _tensors(value)


def _nbytes(tensors: Iterable[Tensor]) -> int:
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())
