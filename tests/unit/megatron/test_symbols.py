"""What nemo_opdlm/megatron/README.md says of Megatron-core is there: names, and the parameters that are passed."""

import ast
import dataclasses
import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron.core
import pytest

REPOSITORY = Path(__file__).parents[3]
TABLE = REPOSITORY / "nemo_opdlm" / "megatron" / "README.md"
PREFIX = "megatron.core."
CODE = re.compile(r"`([^`]+)`")


def rows() -> list[list[str]]:
    """The cells of the table of symbols, row by row."""
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]


SYMBOLS = [symbol for cells in rows() for symbol in CODE.findall(cells[0])]
PATHS = [symbol.partition("(")[0] for symbol in SYMBOLS]


def find(path: str) -> Any:
    """The object at a path below megatron.core; a field's or an instance attribute's name stands for itself."""
    found, module = megatron.core, PREFIX.rstrip(".")
    for name in path.split("."):
        module = f"{module}.{name}"
        if hasattr(found, name):
            found = getattr(found, name)
        elif inspect.isclass(found) and has_field(found, name):
            found = name
        elif inspect.ismodule(found) and is_module(module):
            found = importlib.import_module(module)
        else:
            pytest.fail(
                f"megatron-core {megatron.core.__version__} has no {PREFIX}{path}: {TABLE.name} says what needs it"
            )
    return found


def is_module(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def has_field(cls: type, name: str) -> bool:
    """Whether instances have it although the class does not: a dataclass's field, or set by a method."""
    if dataclasses.is_dataclass(cls) and name in {field.name for field in dataclasses.fields(cls)}:
        return True
    own = [base for base in cls.__mro__ if base.__module__.startswith(PREFIX)]
    return any(re.search(rf"\bself\.{name}\b[^=\n]*=", source_of(base)) for base in own)


@functools.cache
def source_of(cls: type) -> str:
    return inspect.getsource(cls)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_a_symbol_is_there_and_takes_what_it_is_passed(symbol: str) -> None:
    path, _, passed = symbol.rstrip(")").partition("(")
    found = find(path)
    if passed:
        known = inspect.signature(found).parameters
        missing = [name for name in passed.split(", ") if name not in known]
        assert not missing, f"megatron-core {megatron.core.__version__}: {PREFIX}{path} takes no {', '.join(missing)}"


def imports() -> Iterator[str]:
    """Everything that the package imports from Megatron, as paths below megatron.core."""
    for file in (REPOSITORY / "nemo_opdlm").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(PREFIX):
                yield from (f"{node.module}.{alias.name}".removeprefix(PREFIX) for alias in node.names)
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names if alias.name.startswith(PREFIX)]
                yield from (name.removeprefix(PREFIX) for name in names)


def test_everything_that_is_imported_stands_in_the_table() -> None:
    imported = set(imports())
    assert len(imported) > 30
    missing = [path for path in imported if not any(f"{known}.".startswith(f"{path}.") for known in PATHS)]
    assert not missing, f"{TABLE.name} says nothing of {missing}"


def test_every_row_names_a_test_that_exists() -> None:
    assert rows()
    for cells in rows():
        symbol, *_, tests = cells
        named = CODE.findall(tests)
        assert len(cells) == 4 and named, symbol
        for path, _, name in (test.partition("::") for test in named):
            file = REPOSITORY / "tests" / path
            text = file.read_text(encoding="utf-8") if file.is_file() else ""
            assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"there is no tests/{path}::{name}"
