"""JSON objects from elsewhere, held against the kinds of value that their keys must have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_opdlm.data.shown import shown

#: What can be drawn and written again; neither NaN nor infinities are below it.
_LARGEST = 1e300


@dataclass(frozen=True)
class Kind:
    """A kind of JSON value.

    Attributes:
        words: what it must be.
        accepts: whether a value is of it.
    """

    words: str
    accepts: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


NUMBER = Kind("a finite number", _is_number)
NUMBER_OR_NULL = Kind("a finite number or null", lambda value: value is None or _is_number(value))
PROBABILITY = Kind("a number from 0 to 1", lambda value: _is_number(value) and 0 <= value <= 1)
PROBABILITY_OR_NULL = Kind("a number from 0 to 1, or null", lambda value: value is None or PROBABILITY.accepts(value))
COUNT = Kind("a whole number, at least 0", lambda value: isinstance(value, int) and _is_number(value) and value >= 0)
TEXT = Kind("a text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
LIST = Kind("a list", lambda value: isinstance(value, list))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))


def list_of(kind: Kind) -> Kind:
    """Lists of one kind of value."""
    return Kind(
        f"a list, each item {kind.words}", lambda value: isinstance(value, list) and all(map(kind.accepts, value))
    )


def check_keys(where: str, value: Any, kinds: Mapping[str, Kind]) -> None:
    """Refuse what is no object with these keys.

    Raises:
        ValueError: one line that begins with ``where``.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(value).__name__}")
    for key, kind in kinds.items():
        if not kind.accepts(value.get(key)):
            raise ValueError(f"{where}: {key}={shown(value.get(key))} must be {kind.words}")
