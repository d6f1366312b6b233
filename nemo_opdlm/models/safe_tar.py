"""Reads a tar file that comes from elsewhere: nothing outside of the target folder is ever touched, nothing explodes."""

import io
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

#: An archive has some files per rank that wrote it.
MAX_MEMBERS = 100_000
MAX_DEPTH = 16
#: Long names and the like, which tarfile reads into memory.
MAX_EXTRA_HEADER = 2**20
#: Weights hardly compress; what unpacks to more than so many times its size (and this much in any case) is a bomb.
MAX_COMPRESSION, ALWAYS_UNPACKED = 100, 64 * 2**20
_EXTRA_HEADERS = (
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
)


class ArchiveError(ValueError):
    """An archive cannot be used; one line that names the file and, where there is one, the member."""


class _CheckedHeader(tarfile.TarInfo):
    """A header whose size is neither negative, which sends tarfile round in circles, nor more than it may hold in memory."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_CheckedHeader":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTRA_HEADERS and header.size > MAX_EXTRA_HEADER):
            raise tarfile.ReadError(f"a header claims {header.size} bytes")
        return header


def read_member(path: Path, name: str, limit: int) -> bytes:
    """One file of an archive. All members are listed first (one seek each), so that damage is told at once.

    Args:
        path: the archive.
        name: of the member.
        limit: bytes that it may have.

    Raises:
        ArchiveError: the archive is damaged, has no such member, one that is too large, or one that is unsafe.
    """
    with _opened(path) as tar:
        members = _safe_members(path, tar)
        if name not in members or not members[name].isreg():
            raise ArchiveError(f"{path}: {name} is missing: this is no .nemo archive")
        if members[name].size > limit:
            raise ArchiveError(f"{path}: {name} has {members[name].size} bytes, more than the {limit} that are read")
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
                if error.strerror is None:  # of the archive, not of the disk
                    raise
                raise ArchiveError(f"{path}: member {member.name!r} cannot be extracted: {error.strerror}") from error


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    tar = None
    for mode in ("r:", "r:gz"):  # archives of NeMo < 1.7 are compressed
        try:
            tar = tarfile.open(path, mode, tarinfo=_CheckedHeader)  # noqa: SIM115
            break
        except Exception as error:  # tarfile lets many kinds through
            if isinstance(error, OSError) and error.strerror is not None:
                raise ArchiveError(f"{path} cannot be read: {error.strerror}") from error
    if tar is None:
        raise ArchiveError(f"{path}: this is no tar file, so no .nemo archive")
    with tar:
        try:
            yield tar
        except ArchiveError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ArchiveError(f"{path}: the archive is truncated or damaged ({reason})") from error


def _safe_members(path: Path, tar: tarfile.TarFile) -> dict[str, tarfile.TarInfo]:
    """Members by their path below the archive's root; anything but files and folders within it is refused."""
    members: dict[str, tarfile.TarInfo] = {}
    for member in _bounded_members(path, tar):
        name = PurePosixPath(member.name)
        shown = f"{path}: member {member.name[:200]!r}"
        if name.is_absolute() or ".." in name.parts or "\\" in member.name:
            raise ArchiveError(f"{shown} points outside of the archive; it is refused")
        if not member.name.isprintable() or len(name.parts) > MAX_DEPTH:
            raise ArchiveError(f"{shown} has a name that no such file has; it is refused")
        if not (member.isreg() or member.isdir()):
            raise ArchiveError(f"{shown} is a link or device; it is refused")
        if member.issparse():
            raise ArchiveError(f"{shown} is a sparse file, which may claim any size; it is refused")
        if str(name) in members and not member.isdir():
            raise ArchiveError(f"{shown} occurs twice; it is refused")
        members[str(name)] = member
    return members


def _bounded_members(path: Path, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Members as long as they claim what the file can hold; one by one, as the next is found by the size of the last."""
    is_plain, file_size, unpacked = isinstance(tar.fileobj, io.BufferedReader), path.stat().st_size, 0
    for number, member in enumerate(tar):
        unpacked += member.size
        if is_plain and not member.issparse() and member.offset_data + member.size > file_size:
            raise ArchiveError(f"{path}: the archive is truncated within {member.name[:200]!r}")
        if member.size < 0 or (not is_plain and unpacked > max(ALWAYS_UNPACKED, MAX_COMPRESSION * file_size)):
            raise ArchiveError(
                f"{path}: member {member.name[:200]!r} claims {member.size} bytes, the file has {file_size}; it is refused"
            )
        if number == MAX_MEMBERS:
            raise ArchiveError(f"{path}: the archive has more than {MAX_MEMBERS} members; it is refused")
        yield member


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
