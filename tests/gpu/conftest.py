"""Every test of this folder needs a CUDA device; without one it is skipped by name. CPU results come from a subprocess."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_opdlm.megatron.parallel import ParallelContext, initialize

REPOSITORY = Path(__file__).parents[2]
#: Transformer Engine and Apex are hidden from the CPU's process: their Adam takes CUDA tensors only.
ON_CPU = """
import runpy, sys
sys.modules.update(transformer_engine=None, apex=None)
runpy.run_module("tests.gpu.both_devices", run_name="__main__", alter_sys=True)
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def parallel() -> ParallelContext:
    """The layout of one process, over NCCL."""
    return initialize()


@pytest.fixture(scope="session")
def on_cpu(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `both_devices.record` gives in a process without a GPU: only there Megatron's requests for CUDA are redirected."""
    path = tmp_path_factory.mktemp("cpu") / "record.pt"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", ON_CPU, str(path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    record: dict[str, Any] = torch.load(path, weights_only=True)
    return record
