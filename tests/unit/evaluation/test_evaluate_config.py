"""The configuration of examples/evaluate.py."""

from pathlib import Path

import pytest

from nemo_opdlm import cli
from nemo_opdlm.config import parse
from nemo_opdlm.config.evaluate import EvaluateConfig, validate_evaluate


def read(*overrides: str) -> EvaluateConfig:
    return validate_evaluate(parse(cli.compose("evaluate", overrides, EvaluateConfig), EvaluateConfig))


@pytest.fixture
def given(tmp_path: Path) -> list[str]:
    for name in ("student.nemo", "ar.nemo", "prompts.jsonl", "arc.jsonl"):
        (tmp_path / name).write_text("")
    return [f"model.restore_from_path={tmp_path}/student.nemo", f"tasks=[{tmp_path}/arc.jsonl]"]


def test_defaults_are_those_of_generate(given: list[str]) -> None:
    config = read(*given, "modes=[static,speculative]", "threshold=0.5", "block_size=8", "denoising_steps=4")
    decoding = config.decoding("static")
    assert (decoding.mode, decoding.threshold, decoding.block_size, decoding.denoising_steps) == ("static", 0.5, 8, 4)
    assert (decoding.temperature, decoding.seed, decoding.batch_size) == (0.0, 1234, 32)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tasks=[humaneval]"], "set confirm_run_unsafe_code=true"),
        (["tasks=[]"], "nothing to do: give tasks or validation_ds.file_path"),
        (
            ["tasks=[nowhere.jsonl]"],
            "tasks[0]='nowhere.jsonl' does not exist; the only task that is no file is humaneval",
        ),
        (["tasks=[a/arc.jsonl,b/arc.jsonl]"], "must be tasks of different names, not ['arc', 'arc']"),
        (["modes=[]"], "modes=() must be different modes, at least one"),
        (["modes=[static,static]"], "must be different modes"),
        (["modes=[quick]"], "modes"),
        (["num_samples=1"], "num_samples=1 must be at least 2"),
        (["num_questions=0"], "num_questions=0 must be at least 1, or null"),
        (["sandbox.timeout_s=0.0"], "sandbox.timeout_s=0.0 must be above 0"),
        (["sandbox.memory_mib=8"], "sandbox.memory_mib=8 must be at least 64"),
        (["threshold=2.0"], "threshold=2.0 must be"),
        (["validation_ds.num_samples=0"], "validation_ds.num_samples=0 must be at least 1"),
        (["model.restore_from_path=null"], "model.restore_from_path=None must be given"),
        (["json=nowhere/out.json"], "json='nowhere/out.json': the folder does not exist"),
        (["recording=out.json"], "recording='out.json' needs validation_ds.file_path, the prompts that are answered"),
    ],
)
def test_mistakes_are_named_before_anything_is_loaded(given: list[str], overrides: list[str], message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        read(*given, *overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_held_out_prompts_need_the_original(given: list[str], tmp_path: Path) -> None:
    prompts = f"validation_ds.file_path={tmp_path}/prompts.jsonl"
    with pytest.raises(ValueError, match="needs model.kd_teacher_restore_from_path"):
        read(*given, prompts)
    assert (
        read(*given, prompts, f"model.kd_teacher_restore_from_path={tmp_path}/ar.nemo").validation_ds.num_samples == 32
    )


def test_programs_run_where_the_user_has_said_so(given: list[str]) -> None:
    assert read(*given, "tasks=[humaneval]", "confirm_run_unsafe_code=true").tasks == ("humaneval",)
