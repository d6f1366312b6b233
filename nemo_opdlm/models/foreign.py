"""One door to every checkpoint that a run may start from: ours, NeMo 1.x and 2.0, Megatron-Bridge, Hugging Face.

What is not ours is not rewritten: its tensors are read from where they lie, one at a time, into whatever layout the model
has. Nothing in such a checkpoint is trusted; settings are read as plain data and nothing they name is looked up.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from nemo_opdlm.convert.hf_folder import TOKENIZER_FILES
from nemo_opdlm.convert.hugging_face import HfImport, open_hugging_face
from nemo_opdlm.convert.megatron_import import import_megatron
from nemo_opdlm.models.archive_format import (
    CONFIG,
    MODEL_CLASS,
    TARGET,
    Archive,
    check_plain,
    existing,
    naming,
    open_nemo,
    read_archive_config,
    scratch_parent,
)
from nemo_opdlm.models.foreign_layouts import (
    RUN_CONFIG,
    TRACKERS,
    check_nemo_1_members,
    read_bridge,
    read_nemo_1,
    read_nemo_2,
    refuse_without_tokenizer,
)
from nemo_opdlm.models.precision import precision_name
from nemo_opdlm.models.safe_tar import ArchiveError, extract

#: Tokens of a block that an imported model proposes for training.
BLOCK_SIZE = 4


class Kind(Enum):
    """Whose checkpoint it is."""

    OURS = "a .nemo archive of this package"
    NEMO_1 = "a NeMo 1.x archive (model_config.yaml and weights)"
    NEMO_2 = "a NeMo 2.0 folder (context/ and weights/)"
    BRIDGE = "a Megatron-Bridge folder (run_config.yaml, or its parent)"
    HUGGING_FACE = "a Hugging Face folder (config.json and safetensors)"


@dataclass(frozen=True)
class Choices:
    """What a user may decide about a checkpoint that is not ours.

    Attributes:
        tokenizer: folder of the tokenizer; None = the checkpoint's own.
        mask_token: the token that stands for "masked"; None chooses one.
        dtype: type of the weights; None keeps the checkpoint's.
    """

    tokenizer: str | Path | None = None
    mask_token: str | None = None
    dtype: torch.dtype | None = None


def recognise(path: Path) -> Kind:
    """Whose checkpoint a file or folder is, by the files that every one of them has.

    Raises:
        ValueError: it is none that can be read.
    """
    if not path.is_dir() or (path / CONFIG).is_file():
        model = str(read_archive_config(path).get("target", "")).rsplit(".", 1)[-1]
        # All GPT classes of NeMo 1.x and NeMo-Aligner keep the same tensors; others are refused as not ours.
        return Kind.NEMO_1 if "GPT" in model and model != MODEL_CLASS else Kind.OURS
    if (path / "context").is_dir() and (path / "weights").is_dir():
        return Kind.NEMO_2
    if any((path / name).is_file() for name in (RUN_CONFIG, *TRACKERS)):
        return Kind.BRIDGE
    if (path / "config.json").is_file():
        return Kind.HUGGING_FACE
    if (path / ".metadata").is_file():
        raise ArchiveError(
            f"{path} is a distributed checkpoint without the model's settings: give the folder or .nemo file it belongs "
            "to; a training checkpoint of this package is resumed with exp_manager.resume_from_checkpoint"
        )
    raise ArchiveError(f"{path} is no checkpoint that can be read: {'; '.join(kind.value for kind in Kind)}")


@contextmanager
def open_checkpoint(
    path: str | Path, tokenizer: str | Path | None = None, scratch: str | Path | None = None
) -> Iterator[Archive]:
    """Open a checkpoint of any kind for the length of a block, as if it were an archive of ours.

    Args:
        path: file or folder.
        tokenizer: folder of the tokenizer, for checkpoints of other kinds that hold none.
        scratch: where to extract to, as for `open_nemo`.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: it is of no kind that can be read, damaged, unsafe, or another network than ours; one line that names
            file and setting, tensor or member.
    """
    path = existing(path)
    if recognise(path) is Kind.OURS:
        with open_nemo(path, scratch) as archive:
            yield archive
        return
    with _scratch(path, scratch) as temporary, open_foreign(path, Choices(tokenizer), temporary) as (imported, folder):
        files = temporary / "tokenizer"
        files.mkdir()
        for name, content in imported.tokenizer_files.items():
            (files / name).write_bytes(content)
        config = archive_config(imported)
        if tokenizer is not None:
            # Whoever names this tokenizer again means the one laid out here, in which the mask token is registered.
            config["tokenizer"] = {"type": str(tokenizer)}
        yield Archive(path, folder, config, imported.state_dict, files)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings of a checkpoint of any kind; an archive of ours is not extracted for them.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint`.
    """
    if recognise(existing(path)) is Kind.OURS:
        return read_archive_config(path)
    with open_checkpoint(path) as archive:
        return archive.config


@contextmanager
def open_foreign(path: Path, choices: Choices, temporary: Path) -> Iterator[tuple[HfImport, Path]]:
    """Open a checkpoint that is not ours; its tensors can be read within the block.

    Args:
        path: file or folder.
        choices: of the user.
        temporary: an empty folder, for what has to be extracted.

    Yields:
        The model, and the folder that holds its files.

    Raises:
        ValueError: as `open_checkpoint`; also for an archive of ours, which needs no import.
    """
    kind = recognise(path)
    if kind is Kind.OURS:
        raise ArchiveError(f"{path} is {kind.value} already")
    if kind is Kind.HUGGING_FACE:
        yield _without_references(_open_hugging_face(path, choices), path), path
        return
    folder = path
    if not path.is_dir():
        folder = temporary / "archive"
        extract(path, folder, lambda names: check_nemo_1_members(path, names))
    elif kind is Kind.NEMO_1:
        check_nemo_1_members(path, (str(file.relative_to(path)) for file in path.rglob("*")))
    read = {Kind.NEMO_1: read_nemo_1, Kind.NEMO_2: read_nemo_2, Kind.BRIDGE: read_bridge}[kind]
    with nullcontext() if folder == path else naming(path, folder):
        imported = import_megatron(read(folder, choices.tokenizer), choices.mask_token, choices.dtype)
        yield _without_references(imported, path), folder


def archive_config(imported: HfImport, block_size: int = BLOCK_SIZE) -> dict[str, Any]:
    """The settings of an archive that holds an imported model.

    Args:
        imported: the model.
        block_size: proposed for training; an SDAR folder's own wins.
    """
    return {
        "target": TARGET,
        **asdict(imported.architecture),
        "precision": precision_name(getattr(torch, imported.origin.dtype)),
        "opdlm": {
            "block_size": imported.origin.block_size or block_size,
            "mask_token_id": imported.origin.mask_token_id,
        },
        "origin": imported.origin.as_dict(),
    }


def _without_references(imported: HfImport, path: Path) -> HfImport:
    check_plain(imported.origin.as_dict(), f"{path}: generation_config.json or the mask token")
    return imported


def _open_hugging_face(path: Path, choices: Choices) -> HfImport:
    if choices.tokenizer is None and not any((path / name).is_file() for name in TOKENIZER_FILES):
        refuse_without_tokenizer(path)
    return open_hugging_face(path, choices.mask_token, choices.dtype, choices.tokenizer)


@contextmanager
def _scratch(path: Path, scratch: str | Path | None) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".nemo-", dir=scratch_parent(path.parent, scratch)) as temporary:
        yield Path(temporary)
