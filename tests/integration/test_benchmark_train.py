"""The benchmarks run and compare like with like; their timings are nobody's law."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def test_train_compares_updates_of_the_same_loss(glassllm_folder: Path, tmp_path: Path) -> None:
    sizes = "--num_rows 3 --prompt_len 9 --mean_tokens 14 --cap 25 --memory_tokens 512 --pack_to_tokens 64 --repeats 1"
    out = tmp_path / "train.json"
    command = [sys.executable, "examples/benchmark.py", "train", "--model", str(glassllm_folder), *sizes.split()]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, "--json", str(out)], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(out.read_text(encoding="utf-8"))
    assert figures["loss"]["ours"] == pytest.approx(figures["loss"]["reference"], rel=1e-4)
    assert figures["speedup_per_useful_token"] > 0 and figures["matmul_efficiency"] > 0
    # Counted, not timed: the same on every machine.
    ours, reference = figures["arms"]["ours"], figures["arms"]["reference"]
    # Everything needed, and the layers' forward pass once more.
    assert 1.2 <= ours["spent_over_needed"] <= 1.5 < reference["spent_over_needed"]
    assert figures["peak_memory_ratio"] > 1
    assert figures["peak_memory_256k_over_32k_vocab"] == pytest.approx(1, abs=0.1)
