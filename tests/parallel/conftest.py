"""Processes that all parallel tests share, and the model they work on."""

from collections.abc import Iterator

import pytest

from nemo_opdlm.convert import sources
from nemo_opdlm.models.conversion import convert_hf_to_nemo
from nemo_opdlm.testing.ranks import Ranks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def four_ranks() -> Iterator[Ranks]:
    with Ranks(4) as ranks:
        yield ranks


@pytest.fixture(scope="session")
def glassllm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The archive of glassllm, converted by one process."""
    path = tmp_path_factory.mktemp("glassllm") / "glassllm.nemo"
    convert_hf_to_nemo(sources.fetch("glassllm"), path)
    return str(path)
