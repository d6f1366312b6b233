"""Single values of settings that others wrote: each is what it must be, or is refused by its key."""

import math
from collections.abc import Mapping
from typing import Any

from nemo_opdlm.data.shown import shown


def count(key: str, value: Any) -> int:
    """A positive integer.

    Raises:
        ValueError: it is none.
    """
    if value is None:
        raise ValueError(f"{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**63:
        raise ValueError(f"{key}={shown(value)} must be a positive integer")
    return value


def switch(key: str, value: Any) -> bool:
    """True or false.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"{key}={shown(value)} must be true or false")
    return value


def number(key: str, value: Any) -> float:
    """A finite number; YAML readers that follow the letter take `1e-5` for text.

    Raises:
        ValueError: it is none.
    """
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result):
        raise ValueError(f"{key}={shown(value)} must be a number")
    return result


def section(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A section of settings; empty where it is not there or null.

    Raises:
        ValueError: it is none.
    """
    value = settings.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{key}={shown(value)} must be a section")
    return value


def token_ids(settings: Mapping[str, Any], key: str) -> list[int]:
    """Token ids, of which there may be none, one or a list.

    Raises:
        ValueError: they are none.
    """
    value = settings.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(id) is int and -1 <= id < 2**31 for id in ids):  # -1: unset, in old configs
        raise ValueError(f"{key}={shown(value)} must be a token id or a list of them")
    return ids
