"""Settings files of other trainers as plain data: their objects, functions and tags are never looked up, only named."""

import json
import re
from pathlib import Path
from typing import Any

import yaml


class _InertLoader(yaml.SafeLoader):
    """YAML whose unknown tags become the plain value below them, or the tag's own text where that is empty."""

    def plain(self, node: yaml.Node) -> Any:
        """The value of a node with an unknown tag."""
        if isinstance(node, yaml.MappingNode):
            return self.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return self.construct_sequence(node, deep=True)
        return self.construct_scalar(node) or node.tag  # type: ignore[arg-type]


_InertLoader.add_constructor(None, _InertLoader.plain)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of settings.

    Raises:
        ValueError: it cannot be read, or holds no settings.
    """
    try:
        settings = yaml.load(path.read_text(encoding="utf-8"), _InertLoader)  # noqa: S506 (a safe loader)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except Exception as error:  # yaml raises errors of many kinds, and deep nesting RecursionError
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} cannot be read: {reason}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings")
    return settings


def read_fiddle_json(path: Path, *needed: str) -> dict[str, Any]:
    """The settings of one object in `io.json`, in which NeMo 2.0 keeps the arguments of objects as a graph (Fiddle's JSON).

    Args:
        path: the file.
        needed: settings by which the object is found.

    Raises:
        ValueError: the file cannot be read, or no object has these settings.
    """
    try:
        objects = json.loads(path.read_text(encoding="utf-8"))["objects"].values()
        found = [_leaves(value["items"]) for value in objects if isinstance(value, dict) and "items" in value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from error
    for settings in found:
        if all(key in settings for key in needed):
            return settings
    raise ValueError(f"{path} names no {needed[0]}: the checkpoint does not say what network it holds")


def _leaves(items: Any) -> dict[str, Any]:
    """Items are pairs of a path element's text, `Attr(name='num_layers')`, and a leaf, a reference or a symbol's name."""
    settings = {}
    for element, value in items:
        name = re.search(r"name='(\w+)'", str(element))
        if name is None or not isinstance(value, dict):
            continue
        if value.get("type") == "leaf":
            settings[name[1]] = value.get("value")
        elif value.get("type") == "pyref":
            settings[name[1]] = f"{value.get('module')}.{value.get('name')}"
    return settings
