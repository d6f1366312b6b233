"""`make quickstart`, cut short: every stage on the real model."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nemo_opdlm import cli
from nemo_opdlm.config import parse, validate
from nemo_opdlm.evaluation.generation import Generator
from nemo_opdlm.models.conversion import open_model

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "examples" / "quickstart.py"
FIGURES = {"heldout_kl", "kl", "teacher_loglik", "teacher_agreement", "repeat_4gram", "tokens_per_forward"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run(glassllm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """The script's run of four updates, with its folder as `args[-1]`."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    command = [sys.executable, str(SCRIPT), "--model", "glassllm", "--max_steps", "4", "--output_dir", str(folder)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    # From another folder: the prompts must be found all the same.
    finished = subprocess.run(
        command, cwd=folder.parent, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert finished.returncode == 0, finished.stderr
    return finished


@pytest.fixture(scope="module")
def folder(run: subprocess.CompletedProcess[str]) -> Path:
    return Path(run.args[-1])


@pytest.fixture(scope="module")
def summary(folder: Path) -> dict[str, object]:
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def test_the_summary_says_what_was_done_and_where_it_is(summary: dict[str, object], folder: Path) -> None:
    counts = {name: summary[name] for name in ("model", "optimizer_steps", "generated_tokens")}
    assert counts == {"model": "glassllm", "optimizer_steps": 4, "generated_tokens": 4 * 32 * 32}
    assert summary["trained_tokens"] > 0 and summary["seconds"] > 0  # type: ignore[operator]
    assert set(summary) - set(counts) == {
        *("seconds", "trained_tokens", "before", "after", "teacher_repeat_4gram", "heldout_checksum"),
        *("nemo_file", "ar_nemo_file", "hf_dir"),
    }
    for name in ("nemo_file", "ar_nemo_file", "hf_dir"):
        assert Path(str(summary[name])).exists() and folder in Path(str(summary[name])).parents


def test_before_and_after_hold_the_same_figures(summary: dict[str, dict[str, float]]) -> None:
    before, after = summary["before"], summary["after"]
    assert set(before) == set(after) == FIGURES
    assert before["heldout_kl"] > after["heldout_kl"] > 0
    for figures in (before, after):
        assert figures["teacher_loglik"] < 0 and 0 <= figures["teacher_agreement"] <= 1
        assert 0 <= figures["repeat_4gram"] <= 1 and figures["tokens_per_forward"] > 0


def test_the_run_is_told_stage_by_stage_and_without_chatter(run: subprocess.CompletedProcess[str]) -> None:
    stages = [line for line in run.stdout.splitlines() if line.startswith("[") and "/" in line[:4]]
    assert [line[:5] for line in stages] == [f"[{i}/7]" for i in range(1, 8)]
    assert all(part in run.stdout for part in ("glassllm before and after", "prompt 3", "  before", "  after"))
    for chatter in ("NeMo W", "NeMo I", "Apex", "TPU", "rank", "Warning"):
        assert chatter not in run.stdout + run.stderr


def test_the_log_has_one_line_per_update(folder: Path) -> None:
    lines = (folder / "log" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["global_step"] for line in lines] == [1, 2, 3, 4]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_the_exported_student_is_a_model_for_transformers(folder: Path, glassllm_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported, info = AutoModelForCausalLM.from_pretrained(folder / "hf", output_loading_info=True)
    assert not any(info.values())
    original = AutoModelForCausalLM.from_pretrained(glassllm_folder)
    assert not torch.equal(exported.get_input_embeddings().weight, original.get_input_embeddings().weight)
    with open_model(folder / "student.nemo") as (network, _):
        assert torch.equal(exported.get_input_embeddings().weight, network[0].embedding.word_embeddings.weight)
    assert AutoTokenizer.from_pretrained(folder / "hf").decode([300]) != ""


def test_both_archives_can_write(folder: Path) -> None:
    from nemo_opdlm.config.generate import GenerateConfig

    config = GenerateConfig(max_new_tokens=8)
    texts = []
    for name in ("glassllm.nemo", "student.nemo"):
        generator = Generator.load(folder / name)
        texts += generator.texts(generator.generate([torch.arange(30, 38)], config))
    assert all(texts) and texts[0] != texts[1]


def test_the_training_is_that_of_the_experiment(script: ModuleType) -> None:
    for model, recipe in script.RECIPES.items():
        run = script.Run(model, Path("runs", recipe.experiment))
        told = parse(cli.compose("gpt_opdlm", [f"+experiment={recipe.experiment}"]))
        assert script.compose(recipe, run, None) == validate(told, check_files=False)


def test_another_start_removes_its_own_log_and_export_only(script: ModuleType, tmp_path: Path) -> None:
    run = script.Run("glassllm", tmp_path)
    run.clear()
    for folder in (run.log, run.hf):
        folder.mkdir()
        (folder / "file").touch()
    for name in ("notes.txt", "summary.json"):
        (tmp_path / name).touch()
    run.clear()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".quickstart", "notes.txt"]


@pytest.mark.parametrize("name", ["log", "hf"])
def test_a_folder_of_somebody_else_is_left_alone(script: ModuleType, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "diary.txt").touch()
    with pytest.raises(FileExistsError, match="is not from an earlier quickstart"):
        script.Run("glassllm", tmp_path).clear()
    assert (tmp_path / name / "diary.txt").exists()


def test_a_mistake_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--max_steps", "0", "--output_dir", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1 and run.stderr == "error: trainer.max_steps=0 must be at least 1\n"
