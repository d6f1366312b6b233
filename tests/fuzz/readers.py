"""The readers of what comes from elsewhere, each with whole files to start from and damaged ones made of them."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz.archives import archive
from tests.fuzz.checkpoints import (
    Folder,
    bridge,
    hugging_face,
    index,
    nemo,
    nemo_1,
    nemo_2,
    nemo_2_json,
    tokenizer,
)
from tests.fuzz.engine import Reader
from tests.fuzz.prompt_files import jsonl_cases, parquet_cases, prompts
from tests.fuzz.runs import run
from tests.fuzz.settings import CommandLine, config_cases, override_cases, read_config

#: Maker, and share of all inputs: YAML is slow to read, and every input costs what its reader costs.
_FOLDERS: dict[str, tuple[Callable[[Path], Folder], float]] = {
    "hugging_face": (hugging_face, 0.12),
    "nemo": (nemo, 0.04),
    "nemo_1": (nemo_1, 0.04),
    "nemo_2": (nemo_2, 0.04),
    "nemo_2_json": (nemo_2_json, 0.04),
    "bridge": (bridge, 0.04),
    "index": (index, 0.13),
    "archive": (archive, 0.10),
    "tokenizer": (tokenizer, 0.02),
    "run": (run, 0.05),
}
NAMES = (*_FOLDERS, "jsonl", "parquet", "config", "overrides")


def reader(name: str, folder: Path) -> Reader:
    """One of `NAMES`, with its whole files in an empty folder."""
    if name in _FOLDERS:
        make, share = _FOLDERS[name]
        checkpoint = make(folder)
        return Reader(name, checkpoint.cases, checkpoint.read, checkpoint.names, share)
    if name == "config":
        return Reader(name, config_cases(), read_config, lambda case: "", 0.145)
    if name == "overrides":
        return Reader(name, override_cases(), CommandLine().read, lambda case: "", 0.005)
    read, names = prompts(folder)
    cases, share = (jsonl_cases(), 0.15) if name == "jsonl" else (parquet_cases(), 0.10)
    return Reader(name, cases, read, names, share)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder in memory, where there is one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)
