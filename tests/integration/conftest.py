"""What integration tests share: Megatron's groups of one process, real models from the cache, tiny archives."""

from pathlib import Path

import pytest

from nemo_opdlm.convert import sources
from nemo_opdlm.megatron.parallel import ParallelContext, initialize


@pytest.fixture(scope="session")
def parallel() -> ParallelContext:
    """The layout of one process."""
    return initialize()


@pytest.fixture(scope="session")
def glassllm_folder() -> Path:
    """The Hugging Face folder of glassllm; a 3 MB download the first time."""
    return sources.fetch("glassllm")


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """The Hugging Face folder of SmolLM2, where it was fetched before."""
    source = sources.SOURCES["smollm2"]
    folder = sources.default_cache_dir() / f"smollm2-{source.version}" / "hf"
    if not folder.is_dir():
        pytest.skip("SmolLM2 is not in the cache: 93 MB, fetched by `make quickstart MODEL=smollm2`")
    return folder
