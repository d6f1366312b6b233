"""What `pip install .` gives, outside the repository: configurations, commands, and a core that needs no NeMo."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS: dict[str, str] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "scripts"
]
#: Belong to a checkout.
WITHOUT_COMMAND = {"quickstart", "study"}
#: As if none of these was installed.
BLOCKED = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("nemo", "megatron", "lightning", "pytorch_lightning"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip builds, of a copy: a build leaves folders behind, and takes up those of an earlier one."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in ("nemo_opdlm", "conf", "examples"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", build], cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with the wheel in it."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def outside(installed: Path, folder: Path, code: str) -> str:
    """The output of Python code in a folder elsewhere, with the installed package and without NeMo."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HYDRA_")}
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED + code],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_its_configurations_and_its_scripts(wheel: Path) -> None:
    files = [file for folder in ("nemo_opdlm", "conf") for file in (REPOSITORY / folder).rglob("*") if file.is_file()]
    files += (REPOSITORY / "examples").glob("*.py")
    expected = {f"{file.relative_to(REPOSITORY)}" for file in files if file.suffix not in (".md", ".pyc")}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == {name if name.startswith("nemo_opdlm/") else f"nemo_opdlm/{name}" for name in expected}


def test_every_script_has_a_command_of_its_name() -> None:
    for command, function in SCRIPTS.items():
        module, _, name = function.partition(":")
        script = module.removeprefix("nemo_opdlm.examples.")
        assert name == "main" and command == f"nemo-opdlm-{script.removesuffix('_opdlm').replace('_', '-')}"
    scripts = {file.stem for file in (REPOSITORY / "examples").glob("*.py")} - WITHOUT_COMMAND
    assert {function.partition(":")[0].rpartition(".")[2] for function in SCRIPTS.values()} == scripts


def test_outside_the_repository_and_without_nemo_the_core_and_all_commands_are_there(
    installed: Path, tmp_path: Path
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ndefaults: [paper_4b]\n", encoding="utf-8")
    code = """
import importlib, importlib.metadata, pkgutil, sys, nemo_opdlm
print(nemo_opdlm.__file__)
for name in ("cli", "config", "data", "diffusion", "distillation", "package_info", "rng", "vocab"):
    module = importlib.import_module(f"nemo_opdlm.{name}")
    for inner in pkgutil.iter_modules(getattr(module, "__path__", ())):
        importlib.import_module(f"{module.__name__}.{inner.name}")
points = importlib.metadata.entry_points(group="console_scripts")
commands = {point.name: point.load() for point in points if point.name.startswith("nemo-opdlm-")}
print(*sorted(commands))
sys.argv = "train --config-dir . experiment=mine --cfg job --package model.num_layers".split()
commands["nemo-opdlm-train"]()
"""
    shown = outside(installed, tmp_path, code).split()
    assert shown == [str(installed / "nemo_opdlm" / "__init__.py"), *sorted(SCRIPTS), "36"]
