"""The model that parallel tests work on."""

import pytest

from nemo_opdlm.convert import sources
from nemo_opdlm.models.conversion import convert_hf_to_nemo


@pytest.fixture(scope="session")
def glassllm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The archive of glassllm, converted by one process."""
    path = tmp_path_factory.mktemp("glassllm") / "glassllm.nemo"
    convert_hf_to_nemo(sources.fetch("glassllm"), path)
    return str(path)
