"""Reads a tar file that comes from elsewhere: nothing outside of the target folder is ever touched."""

import gzip
import io
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath


class ArchiveError(ValueError):
    """An archive cannot be used; one line that names the file and, where there is one, the member."""


def read_member(path: Path, name: str) -> bytes:
    """One file of an archive. All members are listed first (one seek each), so that damage is told at once.

    Raises:
        ArchiveError: the archive is damaged, has no such member, or one that is unsafe.
    """
    with _opened(path) as tar:
        members = _safe_members(path, tar)
        if name not in members or not members[name].isreg():
            raise ArchiveError(f"{path}: {name} is missing: this is no .nemo archive")
        stream = tar.extractfile(members[name])
        assert stream is not None
        return stream.read()


def extract(path: Path, folder: Path, check: Callable[[list[str]], None]) -> None:
    """Extract an archive into a new folder.

    Args:
        path: the archive.
        folder: where to; its parent exists.
        check: called with the names of all members before anything is written; may refuse them.

    Raises:
        ArchiveError: the archive is damaged, has an unsafe member, or there is no room for it.
    """
    with _opened(path) as tar:
        members = _safe_members(path, tar)
        check(list(members))
        needed = sum(member.size for member in members.values())
        free = shutil.disk_usage(folder.parent).free
        if needed > free:
            raise ArchiveError(
                f"{path}: extracting needs {needed / 2**30:.1f} GiB, {folder.parent} has {free / 2**30:.1f} GiB free: "
                "set TMPDIR to a larger disk"
            )
        for name, member in members.items():
            try:
                _extract_member(tar, member, folder / name)
            except OSError as error:
                raise ArchiveError(f"{path}: member {member.name!r} cannot be extracted: {error.strerror}") from error


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    tar = None
    for mode in ("r:", "r:gz"):  # archives of NeMo < 1.7 are compressed
        try:
            tar = tarfile.open(path, mode)  # noqa: SIM115
            break
        except (tarfile.TarError, OSError, EOFError, zlib.error):
            continue
    if tar is None:
        raise ArchiveError(f"{path}: this is no tar file, so no .nemo archive")
    with tar:
        try:
            yield tar
        except (tarfile.TarError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ArchiveError(f"{path}: the archive is truncated or damaged ({error})") from error


def _safe_members(path: Path, tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """Members by their path below the archive's root; anything but files and folders within it is refused."""
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar.getmembers():
        name = PurePosixPath(member.name)
        if name.is_absolute() or ".." in name.parts or "\\" in member.name or "\0" in member.name:
            raise ArchiveError(f"{path}: member {member.name!r} points outside of the archive; it is refused")
        if not (member.isreg() or member.isdir()):
            raise ArchiveError(f"{path}: member {member.name!r} is a link or device; it is refused")
        if str(name) in members and not member.isdir():
            raise ArchiveError(f"{path}: member {member.name!r} occurs twice; it is refused")
        members[str(name)] = member
    last = max(members.values(), key=lambda member: member.offset_data, default=None)
    is_plain = isinstance(tar.fileobj, io.BufferedReader)
    if last is not None and is_plain and last.offset_data + last.size > path.stat().st_size and not last.issparse():
        raise ArchiveError(f"{path}: the archive is truncated within {last.name!r}")
    return members


def _extract_member(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Write one member as a new file or folder; modes and owners of the archive are not taken over."""
    if member.isdir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    stream = tar.extractfile(member)
    assert stream is not None
    with target.open("xb") as out:
        shutil.copyfileobj(stream, out, 2**20)
