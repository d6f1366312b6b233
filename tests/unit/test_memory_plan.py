"""Arithmetic of the memory plan; `tests/parallel/test_memory_plan.py` compares whole plans with runs."""

from dataclasses import replace
from typing import get_args

import pytest
import torch

from nemo_opdlm.config import Architecture, Config, ModelConfig, TrainerConfig
from nemo_opdlm.config.method import Divergence
from nemo_opdlm.distillation.divergence import (
    DivergenceKind,
    DivergenceSpec,
    FullTarget,
    Target,
    TokenTarget,
    top_k_target,
)
from nemo_opdlm.megatron import parallel
from nemo_opdlm.megatron.head import LMHead, token_losses
from nemo_opdlm.models.memory_moments import Moment, RowLimits
from nemo_opdlm.models.memory_plan import plan_memory
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.memory import AllocationProfile
from nemo_opdlm.vocab import LocalVocab

ARCH = tiny.architecture(num_layers=8, vocab_size=8192)
CONFIG = Config(
    trainer=TrainerConfig(devices=8, max_steps=100), model=ModelConfig(micro_batch_size=1, global_batch_size=64)
)


def moments(arch: Architecture = ARCH, on_gpu: bool = True, fused_adam: bool = True, **changes: object) -> list[Moment]:
    """Those of the first stage, with some keys of the model changed."""
    config = replace(CONFIG, model=replace(CONFIG.model, **changes))  # type: ignore[arg-type]
    return list(plan_memory(config, arch, arch, on_gpu=on_gpu, fused_adam=fused_adam)[0].moments)


def named(found: list[Moment], name: str) -> Moment:
    return next(moment for moment in found if moment.name == name)


@pytest.mark.parametrize(
    ("kind", "top_k"),
    [(kind, top_k) for kind in get_args(Divergence) for top_k in (0, 16) if not (kind == "nll" and top_k)],
)
def test_a_chunk_of_the_head_holds_the_planned_logits(kind: str, top_k: int) -> None:
    """Without the hidden states, which are few hundredths of the logits here."""
    context, rows = parallel.initialize(), 96
    head = LMHead(tiny.random_network(ARCH, context))
    hidden = torch.randn(rows, ARCH.hidden_size, requires_grad=True)
    stored = top_k_target(torch.randn(rows, ARCH.vocab_size), top_k or 1, LocalVocab())
    teacher = torch.randn(rows, ARCH.hidden_size)

    def target_of(start: int, stop: int) -> Target:
        if kind == "nll":
            return TokenTarget(stored.token_ids[start:stop, 0])
        with torch.no_grad():
            return stored.index(slice(start, stop)) if top_k else FullTarget(head.logits(teacher[start:stop]))

    spec = DivergenceSpec(DivergenceKind(kind), top_k=top_k)
    with AllocationProfile() as profile:
        token_losses(head, hidden, target_of, spec, torch.ones(rows)).loss_sum.backward()
    opdlm = replace(CONFIG.model.opdlm, divergence=kind, divergence_top_k=top_k)  # type: ignore[arg-type]
    opdlm = replace(opdlm, rollout=replace(opdlm.rollout, max_new_tokens=rows))
    planned = named(moments(opdlm=opdlm, on_gpu=False), "update: head").logits
    measured = profile.peak_bytes - 4 * head.model.head_weight().numel()  # the head's gradient
    # The budget of a chunk is counted for the support that takes most.
    assert 0.97 * measured <= planned <= 1.3 * measured


def test_a_prompt_that_does_not_fit_beside_the_longest_response_is_taken_shorter() -> None:
    config = CONFIG.model  # prompts of up to 2,000 tokens, responses of up to 4,000
    assert RowLimits.of(config, 40_960) == RowLimits(2000, 4000, 1, 4)
    assert RowLimits.of(config, 5000) == RowLimits(1000, 4000, 1, 4)
    assert RowLimits.of(config, 256) == RowLimits(1, 255, 1, 4)
    assert RowLimits(6, 5, 2, 4).two_stream == 4 + 3 * 8


def test_responses_that_are_read_need_neither_rollout_nor_teacher() -> None:
    read = replace(CONFIG.model.opdlm, responses="dataset", state_selection="random_mask", divergence="nll")
    assert {moment.name.partition(":")[0] for moment in moments(opdlm=read)} == {"update"}
    assert {moment.teacher for moment in moments(opdlm=read)} == {0}
    taught = {moment.name.partition(":")[0] for moment in moments(opdlm=replace(read, divergence="forward_kl"))}
    assert taught == {"teacher", "update"}


def test_a_stage_keeps_a_micro_batch_for_every_stage_behind_it() -> None:
    stages = plan_memory(
        replace(CONFIG, model=replace(CONFIG.model, pipeline_model_parallel_size=4)),
        ARCH,
        ARCH,
        on_gpu=True,
        fused_adam=True,
    )
    activations = [named(list(stage.moments), "update: layers").activations for stage in stages]
    steps = [more - less for more, less in zip(activations, activations[1:], strict=False)]
    assert steps[0] == steps[1] > 0 and steps[2] > 0


def test_keys_that_save_memory_save_what_they_are_about() -> None:
    plain = named(moments(), "update: layers")
    optim = replace(CONFIG.model.optim, name="distributed_fused_adam")
    sharded = named(moments(optim=optim), "update: layers")
    assert sharded.optimizer == plain.optimizer // 8 and replace(sharded, optimizer=plain.optimizer) == plain
    opdlm = CONFIG.model.opdlm
    waiting = moments(opdlm=replace(opdlm, teacher=replace(opdlm.teacher, offload=True)))
    head = ARCH.vocab_size * ARCH.hidden_size * 2
    assert named(waiting, "update: layers").teacher == head < plain.teacher == named(waiting, "teacher: layers").teacher
    recomputing = moments(
        activations_checkpoint_granularity="full",
        activations_checkpoint_method="uniform",
        activations_checkpoint_num_layers=1,
    )
    assert named(recomputing, "update: layers").activations < plain.activations / 2
    # Of the 16 rows of a rank, eight of 256 tokens fit.
    by_tokens, by_rows = (
        named(moments(opdlm=replace(opdlm, rollout=replace(opdlm.rollout, **limit))), "rollout: layers").cache
        for limit in ({"max_batch_tokens": 8 * 256}, {"max_batch_size": 8})
    )
    assert by_tokens == by_rows == named(moments(), "rollout: layers").cache / 2
