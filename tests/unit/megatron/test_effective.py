"""The line that says what a run really uses."""

import pytest
import torch

from nemo_opdlm.megatron import optimizer as megatron_optimizer
from nemo_opdlm.megatron.effective import effective_settings
from nemo_opdlm.megatron.optimizer import StudentOptimizer, wrap
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.testing import tiny


def make_optimizer(options: ModelOptions, **changes: object) -> StudentOptimizer:
    settings = tiny.optimizer_settings(**changes)
    return StudentOptimizer(
        wrap(tiny.random_network(tiny.architecture(), initialize(), options=options), settings), settings
    )


def test_the_line_of_a_plain_run() -> None:
    assert effective_settings(make_optimizer(ModelOptions()), None) == (
        "Effective settings: precision: fp32 parameters; layers: Megatron; fp8: off; adam: torch, whole state; "
        "gradient_accumulation_fusion: off; overlap_grad_sync: off; overlap_param_sync: off; ub_tp_comm_overlap: off; "
        "recomputation: off; teacher: none"
    )


def test_what_is_asked_for_but_not_here_is_off_and_says_what_it_needs() -> None:
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    options = ModelOptions(
        autocast_dtype=torch.bfloat16, gradient_accumulation_fusion=True, transformer_config=recompute
    )
    overlaps = {"distributed": True, "overlap_grad_sync": True, "overlap_param_sync": True}
    teacher = Teacher(tiny.architecture(), initialize(), options, micro_batch_size=2)
    teacher.network.offload()
    assert effective_settings(make_optimizer(options, **overlaps), teacher) == (
        "Effective settings: precision: fp32 parameters, bf16 autocast; layers: Megatron; fp8: off; adam: torch, whole state; "
        "gradient_accumulation_fusion: off, needs Apex's kernel and a GPU; overlap_grad_sync: on; "
        "overlap_param_sync: off, needs a GPU; ub_tp_comm_overlap: off; recomputation: full, uniform, 1; "
        "teacher: bf16, offloaded"
    )


def test_what_is_on_is_called_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_optimizer, "wants_cpu", lambda: False)
    fp8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
    options = ModelOptions(params_dtype=torch.bfloat16, transformer_config=fp8)
    overlaps = {"distributed": True, "overlap_grad_sync": True, "overlap_param_sync": True}
    line = effective_settings(make_optimizer(options, **overlaps), None)
    for part in (
        "precision: bf16 parameters, fp32 masters; ",
        "fp8: hybrid, tensorwise; ",
        "adam: torch, sharded state; ",
        "overlap_grad_sync: on; overlap_param_sync: on; ",
    ):
        assert part in line
