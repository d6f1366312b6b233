"""The `.nemo` archive as a file format, without NeMo: a plain tar of a YAML, a distributed checkpoint and a tokenizer.

    ./model_config.yaml                     readable settings, without paths of the machine it was made on
    ./model_weights/                        `torch_dist` checkpoint, tensor names start with `model.`
    ./<32 hex digits>_<file name>           one per tokenizer file, named in the YAML as `nemo:<member>`

An archive comes from elsewhere: nothing in it is trusted to have a harmless name, kind or content.
"""

import hashlib
import io
import os
import re
import shutil
import tarfile
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from nemo_opdlm.convert.links import check_tree
from nemo_opdlm.convert.plain_settings import MAX_YAML_BYTES, check_yaml, one_line
from nemo_opdlm.data.bounded import read_bounded
from nemo_opdlm.data.shown import plain, shown
from nemo_opdlm.models.safe_tar import ArchiveError, extract, read_member

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "model_config.yaml"
WEIGHTS = "model_weights"
MODEL_CLASS = "OPDLMModel"
TARGET = f"nemo_opdlm.models.opdlm_model.{MODEL_CLASS}"
#: Name of what is not whole yet, as `megatron.atomic_folder` has it: a run clears it up that a killed one has left.
_SAVING = ".saving-"
#: Settings of the run that made a model, not of the model: where its inputs lay.
PATH_KEYS = frozenset(
    (
        "restore_from_path",
        "restore_from_ckpt",
        "resume_from_checkpoint",
        "kd_teacher_restore_from_path",
        "file_path",
        "data_prefix",
        "nccl_communicator_config_path",
        "ub_tp_comm_overlap_cfg",
    )
)
_OTHER_LAYOUTS = (
    (r"model_weights\.ckpt$", "the weights of one process in one file"),
    (r"(mp_rank_|tp_rank_)\d+", "one file of weights per model-parallel rank"),
    (r"model_weights/.*\.zarray$", "weights in the zarr format, which Megatron-core no longer reads"),
)


@dataclass(frozen=True)
class Archive:
    """An archive laid out as files.

    Attributes:
        source: the `.nemo` file or folder it came from, for messages.
        folder: the extracted folder.
        config: the model's settings, without the bookkeeping of tokenizer files.
        weights: folder of the distributed checkpoint; of a checkpoint of another kind, its whole tensors by name.
        tokenizer: folder with the tokenizer files under their own names; None if there are none.
        stored_values: values of all tensors of a distributed checkpoint; None of another kind.
    """

    source: Path
    folder: Path
    config: dict[str, Any]
    weights: "Path | Mapping[str, Tensor]"
    tokenizer: Path | None
    stored_values: int | None = None


def read_archive_config(path: str | Path) -> dict[str, Any]:
    """The model's settings from a `.nemo` file or an extracted folder, without extracting anything.

    Raises:
        FileNotFoundError: there is no such path.
        ArchiveError: it is no archive, or its settings cannot be read.
    """
    path = existing(path)
    text = _read_config_file(path) if path.is_dir() else read_member(path, CONFIG, MAX_YAML_BYTES)
    return _parse_config(path, text)[0]


def is_trained(config: Mapping[str, Any]) -> bool:
    """Whether an archive holds a student: the settings of the run that made it, or a folder's that names a block size."""
    return "optim" in config or (config.get("origin") or {}).get("block_size") is not None


@contextmanager
def open_nemo(path: str | Path, scratch: str | Path | None = None) -> Iterator[Archive]:
    """Extract a `.nemo` file for the length of a block, or use an extracted folder as it is.

    Args:
        path: a `.nemo` file, or a folder with the same content.
        scratch: where to extract to; by default $TMPDIR, else beside the archive, else the system's temporary folder.

    Raises:
        FileNotFoundError: there is no such path.
        ArchiveError: it is no archive, damaged, of another kind, or a member of it is unsafe to load.
    """
    path = existing(path)
    parent = scratch_parent(path.parent, scratch)
    with tempfile.TemporaryDirectory(prefix=".nemo-", dir=parent) as temporary:
        folder = path
        if path.is_dir():
            check_tree(path)
        else:
            folder = Path(temporary) / "archive"
            extract(path, folder, lambda names: _check_layout(path, names))
        config, tokenizer_files = _parse_config(path, _read_config_file(folder, path))
        _check_layout(path, [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()])
        tokenizer = _lay_out_tokenizer(path, folder, tokenizer_files, Path(temporary) / "tokenizer")
        with naming(path, folder):
            stored_values = _check_weights(folder)
            yield Archive(path, folder, config, folder / WEIGHTS, tokenizer, stored_values)


def write_nemo(
    output: str | Path,
    config: Mapping[str, Any],
    weights: str | Path,
    tokenizer_files: Mapping[str, bytes],
    *,
    overwrite: bool = False,
    pack: bool = True,
) -> None:
    """Write a `.nemo` archive; it appears under its name only once it is whole.

    Args:
        output: file to write.
        config: the model's settings; where its inputs lay is left out.
        weights: folder of a distributed checkpoint.
        tokenizer_files: file name -> content.
        overwrite: replace an existing file.
        pack: False leaves the same content as a folder.

    Raises:
        FileExistsError: `output` exists and `overwrite` is off.
        OSError: it cannot be written, or the disk is full.
    """
    output = Path(output)
    check_output(output, overwrite=overwrite)
    members = {_member_name(name, content): content for name, content in sorted(tokenizer_files.items())}
    members[CONFIG] = _config_yaml(config, tokenizer_files).encode()
    partial = output.with_name(f"{_SAVING}{output.name}-{uuid.uuid4().hex[:8]}")
    try:
        if pack:
            _write_tar(partial, members, Path(weights))
        else:
            _write_folder(partial, members, Path(weights))
        _replace(partial, output)
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)


def _replace(partial: Path, output: Path) -> None:
    """Put a finished archive in place; an older folder of that name goes only when the new one stands."""
    old = output.with_name(f".{output.name}.old-{uuid.uuid4().hex[:8]}")
    if output.is_dir():
        os.rename(output, old)
    try:
        os.replace(partial, output)
    except OSError:
        if old.exists():
            os.rename(old, output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def check_output(output: str | Path, *, overwrite: bool = False) -> None:
    """Check that an archive can be written, before the work that leads to it.

    Raises:
        FileExistsError: `output` exists and `overwrite` is off.
        OSError: its folder cannot be created or written to.
    """
    output = Path(output)
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists already: remove it or choose another path")
    if output.is_dir() and not (output / CONFIG).is_file():
        raise FileExistsError(f"{output} is a folder and no model: it is left as it is")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise OSError(f"cannot write {output}: {error.strerror} ({output.parent})") from error


def make_scratch(output: str | Path) -> Path:
    """A new temporary folder for the parts of an archive: in $TMPDIR if set, else beside the archive."""
    return Path(tempfile.mkdtemp(prefix=_SAVING, dir=scratch_parent(Path(output).absolute().parent, None)))


def check_class(archive: Archive, name: str = MODEL_CLASS) -> None:
    """Refuse the archive of another kind of model.

    Raises:
        ArchiveError: its `target` is not the class `name`.
    """
    check_target(archive.source, archive.config, name)


def check_target(source: str | Path | None, config: Mapping[str, Any], name: str = MODEL_CLASS) -> None:
    """Refuse the settings of another kind of model.

    Raises:
        ArchiveError: their `target` is not the class `name`.
    """
    target = str(config.get("target", ""))
    if target.rsplit(".", 1)[-1] != name:
        kind = f"a model of class {target}" if target else "a model of unknown class (no `target`)"
        raise ArchiveError(
            f"{source}: {CONFIG} describes {kind}, not {name}: "
            "convert the Hugging Face model with examples/convert_hf_to_nemo.py"
        )


def check_plain(config: Any, what: str) -> None:
    """Refuse settings with a reference: it could read the environment of whoever opens the archive.

    The values are looked at, not their text: YAML has other ways to write a dollar sign.

    Raises:
        ArchiveError: there is one.
    """
    if isinstance(config, Mapping):
        for key, value in config.items():
            check_plain(key, what)
            check_plain(value, what)
    elif isinstance(config, list | tuple):
        for value in config:
            check_plain(value, what)
    elif isinstance(config, str) and "${" in config:
        raise ArchiveError(f"{what} holds a ${{...}} reference; settings of an archive are plain values")


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without places of one machine: known path keys and absolute paths go, a tokenizer keeps its name."""

    def is_path(value: Any) -> bool:
        return isinstance(value, str) and os.path.isabs(value)

    def portable(value: Any) -> Any:
        if isinstance(value, Mapping):
            kept = {key: item for key, item in value.items() if key not in PATH_KEYS and not is_path(item)}
            return {key: portable(item) for key, item in kept.items()}
        return [portable(item) for item in value if not is_path(item)] if isinstance(value, list | tuple) else value

    result: dict[str, Any] = portable(config)
    tokenizer = config.get("tokenizer")
    if isinstance(tokenizer, Mapping) and is_path(tokenizer.get("type")):
        result["tokenizer"]["type"] = Path(tokenizer["type"]).name
    return result


def existing(path: str | Path) -> Path:
    """The absolute path of a file or folder that is there.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path).expanduser().absolute()
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    return path


@contextmanager
def naming(path: Path, folder: Path) -> Iterator[None]:
    """Let errors about a file of the extracted folder name the archive: the folder is gone when the user looks."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        if str(folder) not in text:
            raise
        text = text.replace(f"{folder}/", "").removeprefix(f"{folder}: ").replace(str(folder), "the archive")
        raise ArchiveError(f"{path}: {text}") from error


def scratch_parent(beside: Path, scratch: str | Path | None) -> Path:
    """Where temporary folders go: to `scratch`, else $TMPDIR, else `beside`, else the system's temporary folder."""
    if scratch is not None:
        return Path(scratch)
    if "TMPDIR" in os.environ:
        return Path(tempfile.gettempdir())
    return beside if os.access(beside, os.W_OK) else Path(tempfile.gettempdir())


# -- reading --


def _check_layout(path: Path, names: list[str]) -> None:
    if CONFIG not in names:
        raise ArchiveError(f"{path}: {CONFIG} is missing: this is no .nemo archive")
    for pattern, what in _OTHER_LAYOUTS:
        found = [name for name in names if re.search(pattern, name)]
        if found:
            raise ArchiveError(
                f"{path}: {plain(found[0])} holds {what}; only {WEIGHTS}/, a distributed checkpoint, is read"
            )
    if not any(name.startswith(f"{WEIGHTS}/") for name in names):
        raise ArchiveError(f"{path}: {WEIGHTS}/ is missing: the archive holds no weights")


def _read_config_file(folder: Path, source: Path | None = None) -> bytes:
    try:
        return read_bounded(folder / CONFIG, MAX_YAML_BYTES)
    except (OSError, ValueError) as error:
        reason = str(error).removeprefix(str(folder / CONFIG)).strip()
        raise ArchiveError(f"{source or folder}: {CONFIG} {reason}") from error


def _parse_config(path: Path, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and tokenizer members (file name -> member)."""
    try:
        check_yaml(text.decode("utf-8"))
        config = OmegaConf.to_container(OmegaConf.create(text.decode("utf-8")), resolve=False)
    except Exception as error:  # yaml and OmegaConf raise errors of many kinds
        raise ArchiveError(f"{path}: {CONFIG} cannot be read: {one_line(error)}") from error
    if not isinstance(config, dict) or not config:
        raise ArchiveError(f"{path}: {CONFIG} holds no settings")
    check_plain(config, f"{path}: {CONFIG}")
    tokenizer = config.get("tokenizer")
    files = tokenizer.pop("files", None) if isinstance(tokenizer, dict) else None
    members = {}
    for reference in files.values() if isinstance(files, dict) else ():
        member = str(reference).removeprefix("nemo:")
        if not re.fullmatch(r"[0-9a-f]{32}_\w[\w.-]*", member):
            raise ArchiveError(f"{path}: {CONFIG} refers to {shown(member)}, which is no member of an archive")
        members[member[33:]] = member
    return config, members  # type: ignore[return-value]


def _lay_out_tokenizer(path: Path, folder: Path, files: Mapping[str, str], target: Path) -> Path | None:
    if not files:
        return None
    target.mkdir()
    for name, member in files.items():
        if not (folder / member).is_file():
            raise ArchiveError(f"{path}: {member} is missing: the tokenizer is not complete")
        shutil.copyfile(folder / member, target / name)
    return target


def _check_weights(folder: Path) -> int:
    """Refuse damaged weights, and weights that would execute something when loaded; the number of their values."""
    from nemo_opdlm.megatron.safe_metadata import check, count_values  # torch.distributed: the settings do without

    return count_values(check(folder / WEIGHTS))


# -- writing --


def _member_name(name: str, content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()[:32]}_{name}"


def _config_yaml(config: Mapping[str, Any], tokenizer_files: Mapping[str, bytes]) -> str:
    settings = {"target": TARGET, **portable_config(config)}
    if tokenizer_files:
        references = {
            re.sub(r"\W", "_", name): f"nemo:{_member_name(name, content)}"
            for name, content in sorted(tokenizer_files.items())
        }
        settings["tokenizer"] = {**settings.get("tokenizer", {}), "files": references}
    return OmegaConf.to_yaml(OmegaConf.create(settings))


def _write_tar(path: Path, members: Mapping[str, bytes], weights: Path) -> None:
    def anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.uid = member.gid = 0
        member.uname = member.gname = ""
        member.mode = 0o755 if member.isdir() else 0o644
        return member

    with tarfile.open(path, "w:", dereference=True) as tar:
        for name in sorted(members, key=lambda name: (name != CONFIG, name)):
            member = anonymous(tarfile.TarInfo(f"./{name}"))
            member.size = len(members[name])
            tar.addfile(member, io.BytesIO(members[name]))
        for file in [weights, *sorted(weights.rglob("*"))]:
            member_path = PurePosixPath(WEIGHTS, *file.relative_to(weights).parts)
            tar.add(file, f"./{member_path}", recursive=False, filter=anonymous)


def _write_folder(path: Path, members: Mapping[str, bytes], weights: Path) -> None:
    path.mkdir()
    for name, content in members.items():
        (path / name).write_bytes(content)
    for file in weights.rglob("*"):
        if file.is_file():
            target = path / WEIGHTS / file.relative_to(weights)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
