"""The rollout benchmark runs, all its arms write the same text, and its figures are what they say; never how fast."""

import json
from pathlib import Path

import pytest
import torch

from nemo_opdlm.benchmark import arms
from nemo_opdlm.benchmark.rollouts import tokens_per_forward
from nemo_opdlm.benchmark.workload import MEAN_SHARE, Subject, Workload
from nemo_opdlm.convert.sources import fetch
from tests.integration.training_runs import run_script

_KEYS = {
    "ratio_vs_reference",
    "ratio_vs_hf_batched_equal",
    "ratio_vs_hf_batched_mix",
    "ratio_vs_no_cache",
    "tokens_per_forward_static",
    "tokens_per_forward_dynamic",
    "overhead_share",
}


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.load(fetch("glassllm"), torch.float32)


@pytest.mark.parametrize("block_size", [1, 4])
def test_all_arms_write_the_same_text(subject: Subject, block_size: int) -> None:
    work, settings = Workload.mix(6, 13, 24, 200), subject.settings(block_size)
    ours = arms.ours(subject, work, 4, settings)
    assert ours.token_ids is not None and ours.num_tokens == ours.token_ids.numel()
    for batch_size, uses_cache in ((1, True), (4, True), (6, False)):
        loop = arms.reference(subject, work, batch_size, settings, uses_cache=uses_cache)
        assert torch.equal(loop.token_ids, ours.token_ids), (batch_size, uses_cache)
    assert ours.padding_share == 0 < loop.padding_share


def test_the_published_loop_spends_a_forward_more_on_each_block(subject: Subject) -> None:
    work, settings = Workload.equal(2, 8, 12, 200), subject.settings(4)
    assert arms.reference(subject, work, 2, settings).num_forwards == 1 + 3 * (4 + 1)
    assert arms.ours(subject, work, 2, settings).num_forwards == 1 + 3 * 4
    figures = tokens_per_forward(arms.answer(subject, work, 2, settings))
    assert figures["revealed"] == figures["kept"] == 1 and figures["forwards_per_block"] == 4
    assert figures["ratio_vs_reference"] == pytest.approx(5 / 4)


def test_the_mix_has_the_mean_that_it_promises() -> None:
    assert float(Workload.mix(32, 61, 128, 1000).limits.float().mean()) == pytest.approx(MEAN_SHARE * 128, rel=0.1)


def test_the_script_writes_all_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rollout.json"
    sizes = ["--batch_size", "3", "--prompt_len", "9", "--new_tokens", "10", "--repeats", "1"]
    assert run_script("benchmark.py", "rollout", "--model", "glassllm", *sizes, "--json", str(file)) == 0
    figures = json.loads(file.read_text())
    assert figures.keys() >= _KEYS and figures["identical_tokens_mix"] == 1
    assert figures["tokens_per_forward_static"] == 1 and figures["tokens_per_forward_dynamic"] >= 1
    assert "time per token, divided by ours" in capsys.readouterr().out
