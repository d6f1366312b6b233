"""Settings of every test: offline, quiet, and one thread per process; the processes that all tests share."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from nemo_opdlm.testing.ranks import Ranks

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


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, a file stays whole, and one process has all tests of several ranks.

    Ranks wait for each other: more of them than there are cores take longer together than one after the other.
    """
    if not config.pluginmanager.hasplugin("xdist"):
        return
    for item in items:
        folder = item.path.parent.name
        item.add_marker(pytest.mark.xdist_group("ranks" if folder == "parallel" else item.nodeid.partition("::")[0]))


def _ranks(size: int) -> "Iterator[Ranks]":
    from nemo_opdlm.testing.ranks import Ranks  # torch, which most tests of configurations do without

    with Ranks(size) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def two_ranks() -> "Iterator[Ranks]":
    """Two processes over Gloo."""
    yield from _ranks(2)


@pytest.fixture(scope="session")
def four_ranks() -> "Iterator[Ranks]":
    """Four processes over Gloo."""
    yield from _ranks(4)
