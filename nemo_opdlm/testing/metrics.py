"""What equal runs have in common in `metrics.jsonl`."""

from collections.abc import Mapping, Sequence
from typing import Any

_FOLDERS = ("time/", "throughput/", "memory/")


def is_measured(name: str) -> bool:
    """Whether a metric says how fast a run was and on what, and so differs between runs that are otherwise equal."""
    return name.startswith(_FOLDERS) or name.endswith("_s") or name == "device_hours"


def without_measured(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The lines without such metrics."""
    return [{name: value for name, value in row.items() if not is_measured(name)} for row in rows]
