"""The benchmarks run and compare like with like; their timings are nobody's law."""

import json
from pathlib import Path

import pytest

from tests.integration.training_runs import run_script


def test_train_compares_updates_of_the_same_loss(glassllm_folder: Path, tmp_path: Path) -> None:
    sizes = "--num_rows 3 --prompt_len 9 --mean_tokens 14 --cap 25 --memory_tokens 512 --pack_to_tokens 64 --repeats 1"
    out = tmp_path / "train.json"
    assert run_script("benchmark.py", "train", "--model", str(glassllm_folder), *sizes.split(), "--json", str(out)) == 0
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert figures["loss"]["ours"] == pytest.approx(figures["loss"]["reference"], rel=1e-4)
    assert figures["speedup_per_useful_token"] > 0 and figures["matmul_efficiency"] > 0
    # Counted, not timed: the same on every machine.
    ours, reference = figures["arms"]["ours"], figures["arms"]["reference"]
    # Everything needed, and the layers' forward pass once more.
    assert 1.2 <= ours["spent_over_needed"] <= 1.5 < reference["spent_over_needed"]
    assert figures["peak_memory_ratio"] > 1
    assert figures["peak_memory_256k_over_32k_vocab"] == pytest.approx(1, abs=0.1)
