"""Settings of every test: offline, quiet, and one thread per process, as the parallel tests start several."""

import os

import pytest

# Before anything imports torch or transformers.
for name, value in {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "WANDB_MODE": "disabled",
}.items():
    os.environ.setdefault(name, value)


def pytest_addoption(parser: pytest.Parser) -> None:
    """How thorough `tests/faults` are; `make fault-injection` asks for more."""
    parser.addoption("--kills", type=int, default=1, help="times a run of tests/faults is killed, at each layout")
