"""Text from an archive, in every mode."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_opdlm.config.generate import GenerateConfig
from nemo_opdlm.data.rows import PromptRow
from nemo_opdlm.evaluation.generation import Generator, prompt_rows
from nemo_opdlm.models.conversion import convert_hf_to_nemo
from tests.integration import training_runs

REPOSITORY = Path(__file__).resolve().parents[2]
PROMPTS = ("Alice was beginning to", "The Queen said", "“Who are", "It was all very well to say so, but")
CONFIG = GenerateConfig(prompts=PROMPTS, max_new_tokens=20, threshold=0.2)


@pytest.fixture(scope="module")
def archive(glassllm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "glassllm.nemo"
    convert_hf_to_nemo(glassllm_folder, path, mask_token="<bos>", block_size=4)
    return path


@pytest.fixture(scope="module")
def generator(archive: Path) -> Generator:
    return Generator.load(archive)


def test_autoregressive_text_is_that_of_transformers(generator: Generator, glassllm_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(glassllm_folder)
    config = replace(CONFIG, mode="autoregressive", max_new_tokens=64)
    prompts = generator.encode(prompt_rows(config))
    trajectory = generator.generate(prompts, config)
    assert trajectory.num_forwards.tolist() == [64] * len(PROMPTS)
    for row, prompt in enumerate(prompts):
        ids = prompt[None]
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False)[0]
        assert trajectory.token_ids[row, : len(expected)].tolist() == expected.tolist()


@pytest.mark.parametrize(("denoising_steps", "per_forward"), [(None, 1), (2, 2), (1, 4)])
def test_static_decoding_reveals_a_fixed_number_per_forward(
    generator: Generator, denoising_steps: int | None, per_forward: int
) -> None:
    config = replace(CONFIG, mode="static", denoising_steps=denoising_steps)
    # Prompts of whole blocks: a first block that the prompt has begun has fewer tokens to reveal.
    trajectory = generator.generate([torch.arange(30, 38), torch.arange(50, 54)], config)
    for row in range(2):
        start = int(trajectory.prompt_len[row])
        _, counts = trajectory.unmask_step[row, start : start + 20].unique(return_counts=True)
        assert counts.tolist() == [per_forward] * (20 // per_forward)


def test_dynamic_decoding_with_any_confidence_takes_one_forward_per_block(generator: Generator) -> None:
    config = replace(CONFIG, threshold=1e-9)
    trajectory = generator.generate(generator.encode(prompt_rows(config)), config)
    first, last = trajectory.prompt_len // 4, (trajectory.prompt_len + trajectory.response_len - 1) // 4
    assert trajectory.num_forwards.tolist() == (last - first + 1).tolist()


def test_the_block_size_can_be_another_than_the_models(generator: Generator) -> None:
    assert generator.block_size == 4
    config = replace(CONFIG, block_size=8, threshold=1e-9)
    trajectory = generator.generate([torch.arange(30, 38)], config)
    assert trajectory.block_size == 8 and trajectory.num_forwards.tolist() == [3]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_speculative_text_is_the_autoregressive_text(generator: Generator, temperature: float) -> None:
    config = replace(CONFIG, mode="autoregressive", temperature=temperature, max_new_tokens=48)
    prompts = generator.encode(prompt_rows(config))
    expected = generator.generate(prompts, config)
    found = generator.generate(prompts, replace(config, mode="speculative"))
    assert torch.equal(found.token_ids, expected.token_ids) and torch.equal(found.response_len, expected.response_len)
    assert found.num_forwards.sum() < expected.num_forwards.sum()


@pytest.mark.parametrize("mode", ["dynamic", "static", "autoregressive", "speculative"])
def test_a_response_depends_on_the_seed_and_not_on_its_batch(generator: Generator, mode: str) -> None:
    config = replace(CONFIG, mode=mode, temperature=1.0)  # type: ignore[arg-type]
    prompts = generator.encode(prompt_rows(config))
    texts = generator.texts(generator.generate(prompts, config))
    assert generator.texts(generator.generate(prompts, replace(config, batch_size=3))) == texts
    assert generator.texts(generator.generate(prompts, replace(config, seed=7))) != texts


def test_responses_end_where_the_context_does(generator: Generator) -> None:
    long = torch.full((generator.context_len - 3,), 40)
    assert generator.generate([long], CONFIG).response_len.tolist() == [3]


def test_progress_is_told_until_all_is_written(generator: Generator) -> None:
    heard: list[dict[str, int]] = []
    generator.generate(generator.encode(prompt_rows(CONFIG)), replace(CONFIG, batch_size=2), heard.append)
    open_rows = [state["num_active"] for state in heard]
    assert open_rows[0] == 4 and open_rows[-1] == open_rows.count(0) - 1 == 0
    assert open_rows == sorted(open_rows, reverse=True) and heard[-1]["num_tokens"] >= 40


@pytest.mark.parametrize(
    ("text", "chat_template", "message"),
    [
        ("before <bos> after", "auto", "contains the mask token"),
        ("Alice was " * 100, "auto", "leaves no room for a response in the model's context of 128"),
        ("Alice", True, "the tokenizer has no chat template"),
    ],
)
def test_prompts_the_model_cannot_answer_are_refused_by_name(
    generator: Generator, text: str, chat_template: bool | str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        generator.encode(prompt_rows(GenerateConfig(prompts=(text,))), chat_template)


def test_prompts_are_encoded_as_for_training(generator: Generator, tmp_path: Path) -> None:
    from nemo_opdlm.data.prompts import load_prompts

    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS), encoding="utf-8")
    expected = load_prompts(file, tokenizer=generator.tokenizer, max_prompt_length=100)
    found = generator.encode(prompt_rows(GenerateConfig(prompts_file=str(file))))
    assert [ids.tolist() for ids in found] == [ids.tolist() for ids in expected]


def test_a_conversation_needs_a_chat_template(generator: Generator) -> None:
    row = PromptRow("file:3", "3", None, ({"role": "user", "content": "Hello"},), None)
    with pytest.raises(ValueError, match="file:3: 'messages' need a chat template"):
        generator.encode([row])


def test_more_denoising_steps_than_tokens_are_refused(generator: Generator) -> None:
    with pytest.raises(ValueError, match="denoising_steps=5 must be from 1 to block_size=4"):
        generator.generate([torch.arange(30, 38)], replace(CONFIG, denoising_steps=5))


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    """The script, and after it the names of heavy frameworks that it imported."""
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['generate.py', *{arguments!r}]\n"
        f"runpy.run_path({str(REPOSITORY / 'examples' / 'generate.py')!r}, run_name='__main__')\n"
        "print('imported', sorted({'nemo', 'lightning'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_the_script_prints_texts_figures_and_the_order_of_unmasking(archive: Path) -> None:
    run = run_script(
        f"model.restore_from_path={archive}", 'prompts=["Alice was"]', "max_new_tokens=8", "show_steps=true"
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert lines[:2] == ["--- prompt 1: 2 tokens", "Alice was"]
    assert lines[2].startswith("--- response 1: 8 tokens, ") and lines[2].endswith("ended by the length limit")
    blocks = [line for line in lines if line.startswith("  block ")]
    assert [line.count(":'") for line in blocks] == [2, 4, 2]
    assert lines[-2].startswith("in all, by dynamic decoding in blocks of 4: 8 tokens") and "tokens/s" in lines[-2]
    assert lines[-1] == "imported []"


def test_a_mistake_is_one_line_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.nemo").write_text("no archive", encoding="utf-8")
    arguments = (f"model.restore_from_path={tmp_path / 'broken.nemo'}", 'prompts=["Alice was"]')
    assert training_runs.run_script("generate.py", *arguments) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'broken.nemo'}: this is no tar file, so no .nemo archive\n"
