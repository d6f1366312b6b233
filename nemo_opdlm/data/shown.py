"""Values from elsewhere as a message shows them: one line, cut off where it is long."""

from typing import Any

#: Long enough for a path of a cluster.
_LONGEST = 400


def shown(value: Any) -> str:
    """A value, as Python writes it."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "an integer of more than 40 digits"
    try:
        return shortened(repr(value))
    except (ValueError, RecursionError):  # a container of such integers, or of itself
        return f"a {type(value).__name__}"


def plain(name: str) -> str:
    """A name, as it is unless it is long or no single line."""
    return name if name.isprintable() and len(name) <= _LONGEST else repr(name[:_LONGEST])


def shortened(text: str) -> str:
    """A text of one line."""
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
