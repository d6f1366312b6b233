"""Error messages of the specifications in this package: key, value, what is allowed."""

from enum import Enum
from typing import TypeVar

E = TypeVar("E", bound=Enum)


def member(kind: type[E], key: str, value: object) -> E:
    """The member of `kind` that `value` is or spells; ValueError names `key`, `value` and the allowed ones."""
    try:
        return kind(value)
    except ValueError:
        allowed = ", ".join(str(each.value) for each in kind)
        raise ValueError(f"{key}={value!r} is unknown; allowed: {allowed}") from None


def check(key: str, value: object, valid: bool, allowed: str) -> None:
    """Raise ValueError naming `key`, `value` and what is `allowed`, unless `valid`."""
    if not valid:
        raise ValueError(f"{key}={value!r} is not possible; allowed: {allowed}")
