"""The memory plan against runs: what each rank holds, and what every phase of a rollout step allocates beside it."""

import pytest
import torch

from nemo_opdlm.config import Architecture
from nemo_opdlm.models.memory_moments import StagePlan
from nemo_opdlm.models.memory_plan import plan_memory
from nemo_opdlm.testing.ranks import Ranks
from tests.parallel.memory_runs import configure, measure

#: Wide enough for its proportions: logits, activations and weights all count.
ARCH = Architecture(
    num_layers=4,
    hidden_size=128,
    ffn_hidden_size=384,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=32,
    vocab_size=8192,
    max_position_embeddings=512,
    qk_layernorm=True,
)
TIED = Architecture(
    **{**vars(ARCH), "share_embeddings_and_output_weights": True, "qk_layernorm": False, "qkv_bias": True}
)
TWO = "trainer.devices=2"
TOP_K = "model.opdlm.divergence_top_k=16"
RECOMPUTE = (
    "model.activations_checkpoint_granularity=full",
    "model.activations_checkpoint_method=uniform",
    "model.activations_checkpoint_num_layers=1",
)
LONG_PROMPTS = ("model.data.train_ds.max_prompt_length=400", "model.opdlm.rollout.max_new_tokens=4")
STAGES = "model.pipeline_model_parallel_size=2"
#: Name -> network, keys, ranks.
CASES: dict[str, tuple[Architecture, tuple[str, ...], int]] = {
    # Two rows of 160 tokens for the student, three of 96 for the teacher.
    "packed": (
        ARCH,
        (
            "trainer.precision=32",
            "model.opdlm.pack_to_tokens=320",
            "model.opdlm.rollout.num_prompts_per_step=6",
            "model.global_batch_size=6",
        ),
        1,
    ),
    "bf16, fp32 masters": (ARCH, ("trainer.precision=bf16",), 1),
    "autocast": (ARCH, ("trainer.precision=bf16-mixed",), 1),
    "top-k, tied": (TIED, ("trainer.precision=32", TOP_K, "model.opdlm.states_per_rollout=2"), 1),
    # Few supervised tokens in long rows: the layers need most, not the head.
    "recomputation, long prompts": (ARCH, ("trainer.precision=32", *LONG_PROMPTS, *RECOMPUTE), 1),
    # A few supervised tokens: no more is in memory than when the gradients of a tied vocabulary meet.
    "short responses": (TIED, ("trainer.precision=32", TOP_K, "model.opdlm.rollout.max_new_tokens=4", *RECOMPUTE), 1),
    "PP 2": (ARCH, ("trainer.precision=bf16", TWO, STAGES), 2),
    "PP 2, VPP 2, top-k": (
        ARCH,
        (
            "trainer.precision=32",
            TWO,
            STAGES,
            "model.virtual_pipeline_model_parallel_size=2",
            TOP_K,
            "model.micro_batch_size=1",
        ),
        2,
    ),
    "TP 2, SP": (
        ARCH,
        ("trainer.precision=bf16", TWO, "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"),
        2,
    ),
    "CP 2": (ARCH, ("trainer.precision=32", TWO, "model.context_parallel_size=2"), 2),
}


@pytest.mark.parametrize("case", CASES)
def test_a_plan_comes_near_the_run(case: str, two_ranks: Ranks) -> None:
    torch.set_num_threads(1)
    arch, overrides, num_ranks = CASES[case]
    found = two_ranks.run(measure, arch, overrides) if num_ranks == 2 else [measure(arch, overrides)]
    stages = plan_memory(configure(*overrides), arch, arch, on_gpu=False, fused_adam=False)
    for plan in stages:
        # Context-parallel ranks have different shares of the supervised tokens; the plan is for the largest.
        of_stage = found[plan.stage :: len(stages)]
        check(plan, {name: max(rank[name] for rank in of_stage) for name in of_stage[0]})


def check(plan: StagePlan, measured: dict[str, int]) -> None:
    """Compare what is there all the time by itself, and what a phase needs beside it by itself, too."""
    *others, step = plan.moments
    for name in ("parameters", "gradients", "teacher"):
        assert step.items[name] == pytest.approx(measured[name], rel=0.005), name
    # Megatron's Adam also counts the steps of each parameter.
    rollout = plan.phase("rollout")
    assert rollout is not None and rollout.optimizer == pytest.approx(measured["optimizer"], rel=0.005)
    weights = sum(measured[name] for name in ("parameters", "gradients", "optimizer", "teacher"))
    batch = measured["records"] + measured["targets"]
    moments = {
        "rollout": (rollout, weights),
        "teacher pass": (plan.phase("teacher"), weights + measured["records"]),
        "passes": (StagePlan(plan.stage, tuple(others)).phase("update"), weights + batch),
        "step": (step, weights + batch),
    }
    for phase, (moment, held) in moments.items():
        assert moment is not None
        beside = moment.total - held
        assert beside == pytest.approx(measured[phase], rel=0.15), phase
