"""The script that prints a memory plan: the arguments of a training run, and no weights."""

from pathlib import Path

import pytest

from tests.integration.training_runs import run_script, write_prompts, write_tiny_archive


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_tiny_archive(folder)
    write_prompts(folder / "prompts.jsonl")
    return folder


def arguments(folder: Path, model: str) -> tuple[str, ...]:
    return (
        f"model.restore_from_path={folder / model}",
        f"model.data.train_ds.file_path={folder / 'prompts.jsonl'}",
        "model.data.train_ds.max_prompt_length=8",
        "model.opdlm.rollout.max_new_tokens=12",
        "trainer.accelerator=cpu",
        "trainer.max_steps=100",
    )


@pytest.mark.parametrize("model", ["qwen3-tied-wide-heads-0.nemo", "hf-qwen3-tied-wide-heads-0"])
def test_a_plan_needs_the_shape_of_a_network_and_no_weights(
    model: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert run_script("plan.py", *arguments(folder, model)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("Memory of a process: ") and line.rstrip().endswith("MiB") for line in lines)
    words = [line.strip("│ ").split(" ")[0] for line in lines]
    items = ["parameters", "gradients", "optimizer", "teacher", "targets", "cache", "activations", "logits", "total"]
    assert [word for word in words if word in items] == items
    assert "1 x 32 tokens in a micro-batch" in " ".join(lines)
    assert "Pipeline stages" not in " ".join(lines)


def test_without_a_checkpoint_the_network_of_a_group_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_script("plan.py", "experiment=paper_8b", "parallel=tp2") == 0
    assert "Memory of a GPU: " in capsys.readouterr().out
    assert run_script("plan.py", "experiment=paper") == 2
    assert "a choice of the group model, e.g. model=qwen3_4b" in capsys.readouterr().err


def test_pipeline_stages_have_a_line_each(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    layout = ("trainer.devices=2", "model.pipeline_model_parallel_size=2", "model.opdlm.divergence=nll")
    packed = "model.opdlm.pack_to_tokens=64"
    assert run_script("plan.py", *arguments(folder, "qwen3-tied-wide-heads-0.nemo"), *layout, packed) == 0
    out = capsys.readouterr().out
    assert "packed to 64 tokens, 32 of a row" in " ".join(out.split())
    table = out[out.index("Pipeline stages") :].splitlines()
    assert [line.split("│")[1].strip() for line in table if line.startswith("│")] == ["1", "2"]


def test_a_layout_that_does_not_divide_the_network_is_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = ("trainer.devices=4", "model.pipeline_model_parallel_size=4")
    assert run_script("plan.py", *arguments(folder, "qwen3-tied-wide-heads-0.nemo"), *layout) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "pipeline_model_parallel_size=4 must divide num_layers=2" in message
