"""What the distribution promises: a cheap import, a version, and pins that satisfy its own requirements."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import nemo_opdlm

REPOSITORY = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def in_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_is_cheap() -> None:
    heavy = ("nemo", "megatron", "torch", "lightning", "transformers")
    out = in_fresh_python(
        "import sys, time; start = time.perf_counter(); import nemo_opdlm; "
        f"print(time.perf_counter() - start, [name for name in {heavy} if name in sys.modules])"
    )
    seconds, loaded = out.split(maxsplit=1)
    assert loaded.strip() == "[]"
    assert float(seconds) < 1


def test_reading_a_configuration_imports_nothing_heavy() -> None:
    heavy = ("nemo", "megatron", "torch", "lightning", "transformers")
    out = in_fresh_python(
        "import sys; from nemo_opdlm import cli; cli.compose('gpt_opdlm'); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    assert out.strip() == "[]"


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    assert "OPDLMModel" in dir(nemo_opdlm)
    with pytest.raises(AttributeError, match="no attribute 'OPDLModel'"):
        _ = nemo_opdlm.OPDLModel


def test_the_pins_satisfy_the_requirements() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert next(iter(pins)) == "torch"
    assert all("+" not in version for version in pins.values())
    own = (
        PROJECT["dependencies"]
        + PROJECT["optional-dependencies"]["quickstart"]
        + PROJECT["optional-dependencies"]["eval"]
        + PROJECT["optional-dependencies"]["dev"]
    )
    for requirement in map(Requirement, own):
        if requirement.name != "nemo_opdlm":
            assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_traps_of_pypi_are_no_dependency() -> None:
    extras = [name for extra in PROJECT["optional-dependencies"].values() for name in extra]
    names = {Requirement(text).name for text in PROJECT["dependencies"] + extras}
    assert not names & {"apex", "apex-personal", "jetengine", "nemo-rl"}
