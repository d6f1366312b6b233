"""Keys of precision: what contradicts what, what has to be there for FP8, and what Megatron is told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.enums import Fp8Recipe
from megatron.core.fp8_utils import get_fp8_align_size
from omegaconf import OmegaConf

from nemo_opdlm.config import FP8_RECIPES, Config, ModelConfig, parse, validate, validate_architecture
from nemo_opdlm.config import precision as precision_checks
from nemo_opdlm.config.precision import Machine, find_machine
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import transformer_config
from nemo_opdlm.models.settings import model_options, optimizer_settings, teacher_options
from nemo_opdlm.testing import tiny

HOPPER = Machine("2.15.0", (9, 0))
FP8 = {"model.transformer_engine": True, "model.fp8": True, "model.fp8_hybrid": True}
MXFP8 = FP8 | {"model.fp8_hybrid": False, "model.fp8_e4m3": True, "model.fp8_recipe": "mxfp8"}


def checked(tmp_path: Path, overrides: dict[str, Any]) -> Config:
    (tmp_path / "prompts.jsonl").touch()
    composed = OmegaConf.create({})
    required = {
        "trainer.max_steps": 1000,
        "model.restore_from_path": str(tmp_path),
        "model.data.train_ds.file_path": str(tmp_path / "prompts.jsonl"),
    }
    for key, value in {**required, **overrides}.items():
        OmegaConf.update(composed, key, value)
    return validate(parse(composed), environment={})


def model_keys(overrides: dict[str, Any]) -> ModelConfig:
    composed = OmegaConf.create({})
    for key, value in overrides.items():
        OmegaConf.update(composed, key, value)
    return parse(composed).model


# -- refusals --


@pytest.mark.parametrize(
    ("machine", "overrides", "found"),
    [
        (Machine(None, None), FP8, "no Transformer Engine and no GPU"),
        (Machine("2.15.0", None), FP8, "version 2.15.0 and no GPU"),
        (Machine(None, (9, 0)), FP8, "no Transformer Engine and a GPU of 9.0"),
        (Machine("2.15.0", (8, 0)), FP8, "version 2.15.0 and a GPU of 8.0"),
        (Machine("2.15.0", (8, 9)), FP8 | {"model.fp8_recipe": "blockwise"}, "a GPU of 8.9"),
        (Machine("2.2.0", (9, 0)), FP8 | {"model.fp8_recipe": "blockwise"}, "version 2.2.0 and"),
        (Machine("2.1.0", (9, 0)), FP8 | {"model.fp8_recipe": "tensorwise"}, "version 2.1.0 and"),
        (HOPPER, MXFP8, "a GPU of 9.0"),
    ],
)
def test_fp8_stops_without_transformer_engine_or_a_capable_gpu(
    machine: Machine, overrides: dict[str, Any], found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_checks, "find_machine", lambda accelerator: machine)
    with pytest.raises(ValueError, match=r"model\.fp8=True .* needs Transformer Engine .* found ") as caught:
        checked(tmp_path, overrides)
    message = str(caught.value)
    needs = FP8_RECIPES[overrides.get("model.fp8_recipe", "delayed")]
    assert found in message and "\n" not in message and len(message) < 300
    assert f"capability {needs.capability[0]}.{needs.capability[1]} or more" in message


@pytest.mark.parametrize(
    ("machine", "overrides"),
    [
        (HOPPER, FP8),
        (Machine("", (8, 9)), FP8),
        (HOPPER, FP8 | {"model.fp8_recipe": "blockwise"}),
        (Machine("2.1.0", (10, 0)), MXFP8),
        (Machine("2.15.0", (7, 0)), {"model.transformer_engine": True}),
    ],
)
def test_what_is_there_is_accepted(
    machine: Machine, overrides: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision_checks, "find_machine", lambda accelerator: machine)
    checked(tmp_path, overrides)


def test_a_cpu_run_has_no_gpu_wherever_it_runs() -> None:
    assert find_machine("cpu") == Machine(None, None)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (FP8 | {"model.fp8_e4m3": True}, "model.fp8=True needs one of"),
        (
            FP8 | {"model.transformer_engine": False},
            "needs model.transformer_engine=True: Megatron's own layers ignore",
        ),
        (FP8 | {"model.fp8_recipe": "mxfp8"}, "model.fp8_recipe='mxfp8' needs model.fp8_e4m3=True"),
        (FP8 | {"model.first_last_layers_bf16": True}, "contradicts model.fp8_recipe='delayed'"),
        (FP8 | {"model.fp8_params": True}, "contradicts model.optim.name='adamw'"),
    ],
)
def test_contradictory_fp8_keys_are_refused_on_any_machine(
    overrides: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError) as caught:
        checked(tmp_path, overrides)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_fp8_needs_widths_of_whole_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision_checks, "find_machine", lambda accelerator: Machine("2.15.0", (10, 0)))
    config = checked(tmp_path, FP8 | {"model.data.train_ds.max_prompt_length": 64})
    validate_architecture(config, tiny.architecture(ffn_hidden_size=32))
    with pytest.raises(ValueError, match="multiples of 16, but ffn_hidden_size / 1 = 341"):
        validate_architecture(config, tiny.architecture(ffn_hidden_size=341))
    narrow = tiny.architecture(hidden_size=48, ffn_hidden_size=96)
    validate_architecture(config, narrow)
    with pytest.raises(ValueError, match="multiples of 32, but hidden_size = 48"):
        validate_architecture(checked(tmp_path, MXFP8 | {"model.data.train_ds.max_prompt_length": 64}), narrow)


# -- what Megatron is told --


@pytest.mark.parametrize("recipe", list(FP8_RECIPES))
def test_tokens_are_padded_to_what_megatron_aligns_them_to(recipe: str) -> None:
    multiple = FP8_RECIPES[recipe].multiple
    assert multiple == get_fp8_align_size(Fp8Recipe(recipe))
    config = model_keys(FP8 | {"model.fp8_recipe": recipe})
    assert model_options(config, "bf16").token_multiple == multiple
    assert teacher_options(config, model_options(config, "bf16")).token_multiple == 1
    assert model_options(model_keys({}), "bf16").token_multiple == 1


def test_fp8_keys_reach_megatrons_config_and_leave_the_teacher_alone() -> None:
    keys = MXFP8 | {
        "model.fp8_margin": 2,
        "model.fp8_amax_history_len": 16,
        "model.fp8_amax_compute_algo": "most_recent",
        "model.fp8_params": True,
        "model.fp8_wgrad": False,
        "model.tp_only_amax_red": True,
        "model.first_last_layers_bf16": True,
        "model.num_layers_at_start_in_bf16": 2,
        "model.num_layers_at_end_in_bf16": 3,
    }
    config, parallel = model_keys(keys), initialize()
    options = model_options(config, "bf16")
    student = transformer_config(tiny.architecture(num_layers=8), parallel, options)
    expected = {
        "fp8": "e4m3",
        "fp8_recipe": "mxfp8",
        "fp8_margin": 2,
        "fp8_interval": 1,
        "fp8_amax_history_len": 16,
        "fp8_amax_compute_algo": "most_recent",
        "fp8_param": True,
        "fp8_wgrad": False,
        "tp_only_amax_red": True,
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 2,
        "num_layers_at_end_in_bf16": 3,
        "fp8_dot_product_attention": False,
        "fp8_multi_head_attention": False,
    }
    assert {name: getattr(student, name) for name in expected} == expected
    teacher = transformer_config(tiny.architecture(), parallel, teacher_options(config, options))
    assert teacher.fp8 is None and not teacher.fp8_param and not teacher.first_last_layers_bf16
    settings = optimizer_settings(config, 1000, 1.0)
    assert settings.fp8_recipe == "mxfp8" and settings.fp8_params


def test_nemos_defaults_of_delayed_scaling_reach_megatron_not_its_own() -> None:
    student = transformer_config(tiny.architecture(), initialize(), model_options(model_keys(FP8), "bf16"))
    assert (student.fp8, student.fp8_recipe) == ("hybrid", "delayed")
    assert (student.fp8_amax_history_len, student.fp8_amax_compute_algo) == (1024, "max")


@pytest.mark.parametrize(
    ("precision", "o2", "params", "autocast"),
    [
        ("32", False, torch.float32, None),
        ("bf16", False, torch.bfloat16, None),
        ("bf16", True, torch.bfloat16, None),
        ("bf16-mixed", False, torch.float32, torch.bfloat16),
        ("bf16-mixed", True, torch.bfloat16, None),
    ],
)
def test_precision_says_what_parameters_and_products_are(
    precision: str, o2: bool, params: torch.dtype, autocast: torch.dtype | None
) -> None:
    options = model_options(model_keys({"model.megatron_amp_O2": o2}), precision)
    assert (options.params_dtype, options.autocast_dtype) == (params, autocast)


@pytest.mark.parametrize("precision", ["32", "bf16", "bf16-mixed"])
def test_the_teachers_precision_is_its_own(precision: str) -> None:
    student = model_options(model_keys({}), precision)
    assert teacher_options(model_keys({}), student) == student
    for name, dtype in (("32", torch.float32), ("bf16", torch.bfloat16)):
        teacher = teacher_options(model_keys({"model.opdlm.teacher.precision": name}), student)
        assert (teacher.params_dtype, teacher.autocast_dtype) == (dtype, None)
