"""The harness's model: in the causal mode what lm-eval's own `hf` model says of the AR original, in the others its bound."""

import functools
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_opdlm.models.conversion import convert_hf_to_nemo, convert_nemo_to_hf

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install nemo_opdlm[eval]")

import lm_eval  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from nemo_opdlm.evaluation.harness import OPDLMEvalModel  # noqa: E402

QUESTIONS = [
    {"question": "Who was late?", "choices": ["the White Rabbit", "the Queen of Hearts", "a cake"], "answer": 0},
    {"question": "What did Alice do?", "choices": ["She fell down", "Nothing"], "answer": 0},
    {"question": "Where was it?", "choices": ["in the garden", "in a very large house of bricks"], "answer": 1},
]
TASKS = ("choose", "roll", "write")
_COMMON = "dataset_path: json\ntest_split: test\ndataset_kwargs:\n  data_files:\n    test: {file}\n"
_TASKS = {
    "choose": "output_type: multiple_choice\ndoc_to_text: '{{{{question}}}} '\ndoc_to_target: answer\ndoc_to_choice: choices\n",
    "roll": "output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
    "doc_to_target: '{{{{question}}}} {{{{choices[0]}}}} said Alice and went on {{{{question * 9}}}}'\n",
    "write": "output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\ndoc_to_target: '{{{{choices[0]}}}}'\n"
    "generation_kwargs: {{until: ['.'], max_gen_toks: 24}}\n",
}
_METRICS = {"choose": ("acc", "acc_norm"), "roll": ("word_perplexity",), "write": ("exact_match",)}


@pytest.fixture(scope="module")
def task_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    file = folder / "questions.jsonl"
    file.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    for name, text in _TASKS.items():
        metrics = "".join(f"  - metric: {metric}\n" for metric in _METRICS[name])
        content = f"task: {name}\n{(_COMMON + text).format(file=file)}metric_list:\n{metrics}"
        (folder / f"{name}.yaml").write_text(content)
    return folder


#: Softmax in fp64: over SmolLM2's vocabulary that of transformers in fp32 is off by 1e-5 at every token, always upwards.
FP32 = {"dtype": "float32", "softmax_dtype": "float64"}
Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def evaluate(task_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Evaluate]:
    import datasets
    from lm_eval import evaluator

    manager = TaskManager(include_path=str(task_folder), include_defaults=False)

    def run(model: str, limit: int | None = None, **model_args: Any) -> dict[str, Any]:
        """The harness's results; `device` would hide the GPUs from all later tests."""
        results: dict[str, Any] = lm_eval.simple_evaluate(
            model=model,
            model_args=model_args,
            tasks=list(TASKS),
            limit=limit,
            task_manager=manager,
            batch_size=2,
            bootstrap_iters=0,
            device="cpu" if model == "hf" else None,
        )
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(evaluator, "add_env_info", lambda results: None)  # seconds of reading out the machine, each time
        yield run


@pytest.fixture(scope="module")
def archive(glassllm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "glassllm.nemo"
    convert_hf_to_nemo(glassllm_folder, path, mask_token="<bos>", block_size=4)
    return path


def answers(results: dict[str, Any], task: str) -> list[Any]:
    """What the model answered to each request, as plain values."""
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    return [response for sample in samples for response in sample["resps"]]


def assert_same_answers(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Same texts and choices, log-likelihoods to 1e-4."""
    assert answers(found, "write") == answers(expected, "write")
    for task in ("choose", "roll"):
        for ours, theirs in zip(answers(found, task), answers(expected, task), strict=True):
            if task == "choose":
                assert ours[0][1] == theirs[0][1]
                ours, theirs = [ours[0][0]], [theirs[0][0]]
            assert ours == pytest.approx(theirs, abs=1e-4)
    for task, metrics in _METRICS.items():
        for metric in metrics:
            key = f"{metric},none"
            assert found["results"][task][key] == pytest.approx(expected["results"][task][key], rel=1e-5)


def test_the_unconverted_model_is_judged_as_by_the_harness_itself(
    evaluate: Evaluate, archive: Path, glassllm_folder: Path
) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate: pip install nemo_opdlm[dev]")
    expected = evaluate("hf", pretrained=str(glassllm_folder), **FP32)
    assert any(text[0] for text in answers(expected, "write"))
    for mode in ("autoregressive", "speculative"):
        found = evaluate("nemo_opdlm", pretrained=str(archive), mode=mode)
        assert_same_answers(found, expected)
        assert found["config"]["likelihood"] == "causal, exact"


def test_smollm2_is_judged_as_by_the_harness_itself(evaluate: Evaluate, smollm2_folder: Path) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate: pip install nemo_opdlm[dev]")
    expected = evaluate("hf", limit=1, pretrained=str(smollm2_folder), **FP32)
    # The folder itself, as training also reads it.
    found = evaluate("nemo_opdlm", limit=1, pretrained=str(smollm2_folder), mode="autoregressive")
    assert_same_answers(found, expected)


def test_an_exported_folder_is_judged_as_its_archive(archive: Path, tmp_path: Path) -> None:
    convert_nemo_to_hf(archive, tmp_path / "hf", "hf")
    for mode in ("autoregressive", "static"):
        of_archive, of_folder = (OPDLMEvalModel(str(path), mode=mode) for path in (archive, tmp_path / "hf"))
        for model in (of_archive, of_folder):
            requests = [_instance("Alice was", " very tired"), _instance("", "The Queen")]
            assert model.loglikelihood(requests) == of_archive.loglikelihood(requests)
            requests = [_instance("Alice was", {"max_gen_toks": 12})]
            assert model.generate_until(requests) == of_archive.generate_until(requests)


@pytest.mark.parametrize("block_size", [4, 8])
def test_block_diffusion_is_judged_by_its_bound_with_its_error(
    evaluate: Evaluate, archive: Path, block_size: int
) -> None:
    results = evaluate("nemo_opdlm", pretrained=str(archive), mode="dynamic", block_size=block_size, threshold=0.3)
    config = results["config"]
    assert config["mode"] == "dynamic" and config["block_size"] == block_size
    assert ("all states" in config["likelihood"]) == (block_size == 4)
    assert ("likelihood_standard_error" in config) == (block_size == 8)
    assert 0 < config["tokens_per_forward"] <= block_size
    for likelihood in answers(results, "roll"):
        assert math.isfinite(likelihood[0]) and likelihood[0] < 0


def test_a_text_that_the_mode_writes_is_greedy(archive: Path) -> None:
    model = OPDLMEvalModel(str(archive), mode="static", batch_size=4)
    prompt = torch.tensor(model.tok_encode("Alice was beginning"))
    trajectory = model.scorer.write([prompt], max_new_tokens=torch.tensor([6]))
    written = trajectory.token_ids[0, len(prompt) : len(prompt) + 6].tolist()
    requests = [(("", ""), prompt.tolist(), tokens) for tokens in (written, written[:3], written[:5] + [77], [77])]
    assert [is_greedy for _, is_greedy in model._loglikelihood_tokens(requests)] == [True, True, False, False]


def test_long_texts_are_cut_to_the_context(archive: Path) -> None:
    model = OPDLMEvalModel(str(archive), mode="static")
    text = "Alice was not at all sure what to do. " * 30
    assert len(model.tok_encode(text)) > 2 * model.max_length
    (total,) = model.loglikelihood_rolling([_instance(text)])
    assert math.isfinite(total)
    ((likelihood, _),) = model.loglikelihood([_instance(text, "and so on")])
    assert math.isfinite(likelihood)
    (written,) = model.generate_until([_instance(text, {"until": [], "max_gen_toks": 8})])
    assert written
    with pytest.raises(ValueError, match="max_gen_toks=128 must be less than the model's context of 128 tokens"):
        model.generate_until([_instance(text, {"max_gen_toks": 128})])


def test_a_mask_token_in_a_text_is_refused_where_it_would_be_filled(archive: Path) -> None:
    model, causal = (OPDLMEvalModel(str(archive), mode=mode) for mode in ("dynamic", "autoregressive"))
    with pytest.raises(
        ValueError, match="a text contains the mask token '<bos>', which has another meaning in mode=dynamic"
    ):
        model.loglikelihood([_instance("Alice", " was <bos>")])
    with pytest.raises(ValueError, match="a text contains the mask token"):
        model.generate_until([_instance("Alice <bos>", {"max_gen_toks": 4})])
    assert math.isfinite(causal.loglikelihood([_instance("Alice", " was <bos>")])[0][0])


def _instance(*arguments: Any) -> Instance:
    return Instance("loglikelihood", {}, arguments, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 2.0}, "threshold=2.0 must be"),
        ({"mode": "static", "num_samples": 1, "block_size": 8}, "num_samples=1"),
    ],
)
def test_settings_out_of_range_are_refused(archive: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OPDLMEvalModel(str(archive), **settings).loglikelihood([_instance("Alice", " was")])


def test_the_command_line_finds_the_model(
    archive: Path,
    task_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from lm_eval import evaluator, tasks

    from nemo_opdlm.evaluation import harness

    # Thousands of tasks of the harness's own would be read, and the machine.
    monkeypatch.setattr(tasks, "TaskManager", functools.partial(TaskManager, include_defaults=False))
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    arguments = ["--model", "nemo_opdlm", "--model_args", f"pretrained={archive},mode=dynamic", "--tasks", "choose"]
    options = ["--include_path", str(task_folder), "--batch_size", "8", "--output_path", str(tmp_path / "results.json")]
    monkeypatch.setattr("sys.argv", ["lm_eval", *arguments, *options])
    harness.main()
    assert "|choose|" in capsys.readouterr().out
    (file,) = tmp_path.glob("results*.json")
    assert json.loads(file.read_text())["config"]["mode"] == "dynamic"
    monkeypatch.setattr(
        "sys.argv", ["lm_eval", "--model", "nemo_opdlm", "--model_args", "pretrained=nowhere.nemo", *options]
    )
    with pytest.raises(SystemExit, match="error: No tasks specified"):
        harness.main()
