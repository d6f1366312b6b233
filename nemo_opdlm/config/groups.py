"""Groups of configurations: folders of `conf/` whose files are choices, and what to say where a choice is not one."""

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

_CHOICE = re.compile(r"(\+?)([\w/]+)=([\w./-]+)")
#: What Hydra says about a file that does not exist: one choice, then one of several.
_UNKNOWN_CHOICE = re.compile(r"(?:In '([^']*)': )?Could not (?:find|load) '([^']+)'")
#: Where a run is started, which `examples/launch.py` alone reads.
_CLUSTER = "cluster"
_AVAILABLE = re.compile(r"Available options in '([^']+)':\s+(.*?)(?:Config search path:|$)", re.DOTALL)


def read_groups(folder: Path) -> dict[str, tuple[str, ...]]:
    """The groups of a folder of configurations with their choices, e.g. `opdlm/rollout` with `dynamic`, `static` ..."""
    found: dict[str, tuple[str, ...]] = {}
    for file in sorted(folder.glob("*/**/*.yaml")):
        group = file.parent.relative_to(folder).as_posix()
        found[group] = (*found.get(group, ()), file.stem)
    return found


def with_added_choices(overrides: Sequence[str], folder: Path) -> list[str]:
    """The same overrides, with `+experiment=[NAME]` for `+experiment=NAME`, and so for every group.

    Hydra takes the former for a further choice, and refuses the latter where the group has a place in the defaults list.

    Raises:
        ValueError: a group is to be null.
    """
    known = read_groups(folder)
    return [_with_added_choice(override, known) for override in overrides]


def _with_added_choice(override: str, known: Mapping[str, Sequence[str]]) -> str:
    match = _CHOICE.fullmatch(override)
    if match is None or match[2] not in known:
        return override
    plus, group, choice = match.groups()
    if choice == "null":
        raise ValueError(_refusal(group, None, known[group]))
    return f"+{group}=[{choice}]" if plus else override


def unknown_choice(message: str, folder: Path) -> str | None:
    """One line about a choice that is not there, from what Hydra says about it; None if that is about something else.

    Args:
        message: of Hydra's error.
        folder: of configurations, whose choices are named where Hydra names none.
    """
    found, available = _UNKNOWN_CHOICE.match(message), _AVAILABLE.search(message)
    if found is None or "/" not in found[2]:
        return None
    file, path = found.groups()
    group = path.rpartition("/")[0] if available is None else available[1]
    choices = read_groups(folder).get(group, ()) if available is None else available[2].split()
    return place(file) + _refusal(group, path.removeprefix(f"{group}/"), choices)


def place(file: str | None) -> str:
    """The start of a message about a choice's file, under Hydra's name for it; empty where it is about the command line."""
    return f"{file}.yaml: " if file is not None and "/" in file else ""


def _refusal(group: str, choice: str | None, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(choice or "", choices, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return f"{group}={choice!r} must be one of {', '.join(map(repr, choices))}{hint}"


def misplaced(key: str, known: Collection[str]) -> str | None:
    """One line about a key of the cluster, where the script has none; None for every other key."""
    if key.partition(".")[0] != _CLUSTER or _CLUSTER in known:
        return None
    return f"{_CLUSTER} is a group of examples/launch.py, which starts runs elsewhere: here, leave {key} out"


def refuse_strays(composed: Mapping[str, Any], known: Collection[str], folder: Path) -> None:
    """Refuse keys below the name of a group: where a file of the user lacks the line that says where its keys go.

    Raises:
        ValueError: there are some.
    """
    sections = {group.partition("/")[0] for group in read_groups(folder)} - set(known)
    for stray in (str(key) for key in composed if key in sections):
        if (message := misplaced(stray, known)) is not None:
            raise ValueError(message)
        raise ValueError(
            f"{stray} is a group of configurations, not a key: its files start with a line `# @package ...` that says where "
            f"their keys go, as those in conf/{stray} do"
        )
