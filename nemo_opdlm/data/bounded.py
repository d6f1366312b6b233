"""Small files from elsewhere: read up to a size, and JSON in them up to a depth; every fault is one line."""

import json
import re
from pathlib import Path
from typing import Any

#: An index of a model in a thousand shards has some 10 MiB.
MAX_JSON_BYTES = 64 * 2**20
#: Settings are a few levels deep; what walks over them afterwards must not meet Python's limit.
MAX_JSON_DEPTH = 100
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_bounded(path: Path, limit: int) -> bytes:
    """The content of a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or has more than `limit` bytes.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ValueError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if len(content) > limit:
        raise ValueError(f"{path} has more than {limit / 2**20:g} MiB, which no such file has")
    return content


def read_json(path: Path) -> Any:
    """The JSON of a whole file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read, or is no JSON; one line that names it.
    """
    content = read_bounded(path, MAX_JSON_BYTES)
    try:
        return parse_json(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def parse_json(text: bytes, *, allow_surrogates: bool = False) -> Any:
    """Parse a JSON text.

    Args:
        text: UTF-8.
        allow_surrogates: accept escapes of half a character, which cannot be written again.

    Raises:
        ValueError: what is wrong with it, without the file's name.
    """
    try:
        value = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"invalid JSON, {error.msg} at {where}") from None
    except RecursionError:
        raise ValueError(f"invalid JSON, nested more than {MAX_JSON_DEPTH} deep") from None
    except ValueError:
        raise ValueError("invalid JSON, a number of thousands of digits") from None
    _check_depth(value)
    if not allow_surrogates and _SURROGATE.search(text.decode("utf-8")):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("invalid JSON, a \\ud800-\\udfff escape is half a character") from None
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            item
            for container in level
            if isinstance(container, dict | list)
            for item in (container.values() if isinstance(container, dict) else container)
        ]
        if not level:
            return
    raise ValueError(f"invalid JSON, nested more than {MAX_JSON_DEPTH} deep")
