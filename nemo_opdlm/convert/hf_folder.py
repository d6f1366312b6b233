"""Reading and writing Hugging Face model folders, one tensor at a time."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from nemo_opdlm.convert.links import check_links
from nemo_opdlm.data.bounded import MAX_JSON_BYTES, parse_json, read_bounded
from nemo_opdlm.data.shown import plain

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
GENERATION_CONFIG = "generation_config.json"
# What a tokenizer may consist of. Only tokenizer.json is required: the one form that every reader agrees on.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)
MAX_SHARD_SIZE = 5 * 1024**3
#: The largest in use, of 250 000 tokens and their merges, has some 35 MiB.
MAX_TOKENIZER_BYTES = 128 * 2**20


@dataclass(frozen=True)
class HfFolder:
    """An opened Hugging Face folder: small files in memory, tensors on disk until asked for.

    Attributes:
        path: the folder.
        config: parsed `config.json`.
        tokenizer_files: file name -> content.
        generation_config: parsed `generation_config.json`, empty when the folder has none.
        shards: tensor name -> safetensors file.
        shapes: tensor name -> shape, from the file headers.
        dtypes: tensor name -> torch type.
    """

    path: Path
    config: dict[str, Any]
    tokenizer_files: dict[str, bytes]
    generation_config: dict[str, Any]
    shards: dict[str, Path] = field(repr=False)
    shapes: dict[str, tuple[int, ...]] = field(repr=False)
    dtypes: dict[str, torch.dtype] = field(repr=False)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor; the file is mapped, so only this tensor's bytes are read."""
        with safe_open(str(self.shards[name]), framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


def load_hf_folder(path: str | Path, tokenizer: str | Path | None = None) -> HfFolder:
    """Open a local Hugging Face folder and read everything but the weights.

    Args:
        path: the folder.
        tokenizer: another folder to read the tokenizer from.

    Raises:
        ValueError: no such folder, or config, weights, a shard or the tokenizer is missing or unreadable.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give a local Hugging Face folder (hub names are not downloaded)")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json")
    settings = ("config.json", GENERATION_CONFIG, INDEX)
    check_links(folder, [*settings, *(file.name for file in folder.glob("*.safetensors"))])
    config = read_json(folder / "config.json")
    tokenizer_files = read_tokenizer_files(folder if tokenizer is None else Path(tokenizer))
    generation_config = folder / GENERATION_CONFIG
    shards = _tensors_by_file(folder)
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    for shard in dict.fromkeys(shards.values()):
        for name, shape, dtype in _read_header(shard):
            if shards.setdefault(name, shard) != shard:
                raise ValueError(f"{shard} and {shards[name]} both hold tensor {plain(name)}")
            shapes[name], dtypes[name] = shape, dtype
    absent = next((name for name in shards if name not in shapes), None)
    if absent is not None:
        raise ValueError(f"{shards[absent]} does not hold tensor {plain(absent)}, although {INDEX} says so")
    return HfFolder(
        path=folder,
        config=config,
        tokenizer_files=tokenizer_files,
        generation_config=read_json(generation_config) if generation_config.is_file() else {},
        shards=shards,
        shapes=shapes,
        dtypes=dtypes,
    )


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        ValueError: not readable, not JSON, or not an object.
    """
    try:
        content = parse_json(read_bounded(path, MAX_JSON_BYTES))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as JSON: {str(error).removeprefix(f'{path} ')}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, not a {type(content).__name__}")
    return content


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """The tokenizer's files, by name.

    Raises:
        ValueError: the folder has no tokenizer.json, or a file leads out of it or is too large.
    """
    names = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    check_links(folder, names)
    files = {name: read_bounded(folder / name, MAX_TOKENIZER_BYTES) for name in names}
    if "tokenizer.json" not in files:
        advice = "; re-save it with AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)" if files else ""
        raise ValueError(f"{folder} has no tokenizer: tokenizer.json is missing{advice}")
    return files


def _tensors_by_file(folder: Path) -> dict[str, Path]:
    """Tensor name -> file. For a single file the names follow from its header."""
    if (folder / WEIGHTS).is_file():
        return {name: folder / WEIGHTS for name, _, _ in _read_header(folder / WEIGHTS)}
    if not (folder / INDEX).is_file():
        pickles = sorted(folder.glob("pytorch_model*.bin"))
        advice = "; pickled pytorch_model.bin is refused: re-save with save_pretrained(DIR)" if pickles else ""
        raise ValueError(f"{folder} has no weights: neither {WEIGHTS} nor {INDEX}{advice}")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / INDEX} has no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(
                f"{folder / INDEX} places tensor {plain(name)} in {plain(str(file))!r}, which is not a file name"
            )
        if not (folder / file).is_file():
            raise ValueError(f"{folder} lacks shard {plain(file)}, which {INDEX} names")
    return {name: folder / file for name, file in weight_map.items()}


def _read_header(file: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
    try:
        with safe_open(str(file), framework="pt") as tensors:
            names = list(tensors.keys())
            slices = [tensors.get_slice(name) for name in names]
            headers = [(tuple(part.get_shape()), part.get_dtype()) for part in slices]
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a readable safetensors file: {' '.join(str(error).split())[:300]}") from error
    for name, (shape, dtype) in zip(names, headers, strict=True):
        if dtype not in _DTYPES:
            raise ValueError(f"{file}: tensor {plain(name)} has type {dtype}; allowed: {', '.join(_DTYPES)}")
        yield name, shape, _DTYPES[dtype]


_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@contextlib.contextmanager
def write_folder(output: str | Path) -> Iterator[Path]:
    """Give a temporary sibling of `output` to write into, and rename it to `output` when the block ends well.

    A reader never sees half a folder; after an error nothing is left behind.

    Raises:
        ValueError: `output` exists and is not an empty folder.
    """
    target = Path(output).absolute()
    check_output_is_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        _publish_permissions(temporary)
        os.rename(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _publish_permissions(folder: Path) -> None:
    """Give a folder and its files the usual permissions: mkdtemp and safetensors make theirs private."""
    umask = os.umask(0)
    os.umask(umask)
    for path in (folder, *folder.iterdir()):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def check_output_is_free(output: Path) -> None:
    """Refuse an existing output before any work is done.

    Raises:
        ValueError: `output` is a file or a folder with something in it.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"{output} exists already; it is never overwritten: choose another path or remove it")


def save_hf_folder(
    output: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    nbytes: Mapping[str, int],
    files: Mapping[str, bytes | str | dict[str, Any]],
    max_shard_size: int = MAX_SHARD_SIZE,
) -> None:
    """Write a Hugging Face folder, one shard in memory at a time.

    Args:
        output: the folder to create.
        tensors: (name, tensor) pairs in file order.
        nbytes: name -> size of every tensor that `tensors` will yield, in the same order.
        files: the other files: bytes, text, or a dict written as JSON.
        max_shard_size: bytes per weights file; above it, shards and an index are written.

    Raises:
        ValueError: `output` exists, or the disk is too full.
    """
    shards = _plan_shards(nbytes, max_shard_size)
    check_output_is_free(Path(output))
    with write_folder(output) as folder:
        total, free = sum(nbytes.values()), shutil.disk_usage(folder).free
        if total > free:
            raise ValueError(f"{output} needs {total / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on that disk")
        for name, content in files.items():
            _write_file(folder / name, content)
        if len(shards) > 1:
            weight_map = {name: shard for shard, names in shards.items() for name in names}
            _write_file(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
        stream = iter(tensors)
        for shard, names in shards.items():
            held = dict(next(stream) for _ in names)
            assert list(held) == names, "tensors and nbytes disagree"
            held = {name: tensor.detach().cpu().contiguous() for name, tensor in held.items()}
            save_file(held, str(folder / shard), metadata={"format": "pt"})


def _plan_shards(nbytes: Mapping[str, int], max_shard_size: int) -> dict[str, list[str]]:
    """File name -> tensor names, filled in order; a tensor larger than a shard gets one of its own."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, count in nbytes.items():
        if groups[-1] and size + count > max_shard_size:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += count
    if len(groups) == 1:
        return {WEIGHTS: groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": names for n, names in enumerate(groups, 1)}


def _write_file(path: Path, content: bytes | str | dict[str, Any]) -> None:
    if isinstance(content, dict):
        content = dump_json(content)
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def dump_json(content: Mapping[str, Any]) -> str:
    """JSON text as Hugging Face writes it: two spaces, readable characters, a final newline."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
