"""Checksums of a checkpoint's tensor files: a flipped bit in a weight would load without an error and train on."""

import json
import zlib
from collections.abc import Mapping
from pathlib import Path

CHECKSUMS = "checksums.json"
_PIECE = 1 << 24


def checksum(path: Path) -> int:
    """CRC-32 of a file, read piece by piece."""
    value = 0
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            value = zlib.crc32(piece, value)
    return value


def write_checksums(directory: Path, values: Mapping[str, int]) -> None:
    """Leave the checksums of files, by name."""
    (directory / CHECKSUMS).write_text(json.dumps(dict(sorted(values.items()))))


def verify(directory: Path, rank: int, num_ranks: int) -> None:
    """Compare this rank's share of the files with their checksums; checkpoints of other programs have none.

    Raises:
        ValueError: a file is not what was written; one line that names it.
    """
    path = directory / CHECKSUMS
    if not path.is_file():
        return
    try:
        values = json.loads(path.read_bytes())
        expected = {str(name): int(value) for name, value in values.items()}
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it holds no checksums by file name") from error
    for name in sorted(expected)[rank::num_ranks]:
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise ValueError(f"{path} is damaged: it names {name!r}, which is no file of the checkpoint")
        if checksum(file) != expected[name]:
            raise ValueError(f"{file} is damaged: its content is not what was written")
