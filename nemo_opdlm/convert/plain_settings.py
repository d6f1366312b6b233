"""Settings files of other trainers as plain data: their objects, functions and tags are never looked up, only named."""

import re
from pathlib import Path
from typing import Any

import yaml

from nemo_opdlm.data.bounded import MAX_JSON_BYTES, parse_json, read_bounded

#: Settings have some 10 kB, and YAML takes seconds for a megabyte.
MAX_YAML_BYTES = 2**20
#: Values once every alias is written out.
MAX_YAML_VALUES = 100_000
MAX_YAML_DEPTH = 50


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


def check_yaml(text: str) -> None:
    """Refuse a YAML text that would explode when it is read: aliases of aliases, or nesting without end.

    Raises:
        ValueError: it would, or is no YAML.
    """
    counts: dict[int, int] = {}

    def count(node: yaml.Node | None, depth: int) -> int:
        if depth > MAX_YAML_DEPTH:  # an alias of what it stands in, too
            raise ValueError(f"it is nested more than {MAX_YAML_DEPTH} deep")
        if not isinstance(node, yaml.CollectionNode):
            return 1
        if id(node) not in counts:
            children = node.value if isinstance(node, yaml.SequenceNode) else [part for pair in node.value for part in pair]
            counts[id(node)] = 1 + sum(count(child, depth + 1) for child in children)
        if counts[id(node)] > MAX_YAML_VALUES:
            raise ValueError(f"it has more than {MAX_YAML_VALUES} values, aliases written out")
        return counts[id(node)]

    try:
        count(yaml.compose(text, _InertLoader), 0)
    except RecursionError:
        raise ValueError(f"it is nested more than {MAX_YAML_DEPTH} deep") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file of settings.

    Raises:
        ValueError: it cannot be read, or holds no settings.
    """
    try:
        content = read_bounded(path, MAX_YAML_BYTES)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from None
    try:
        text = content.decode("utf-8")
        check_yaml(text)
        settings = yaml.load(text, _InertLoader)  # noqa: S506 (a safe loader)
    except Exception as error:  # yaml raises errors of many kinds
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings")
    return settings


def one_line(error: Exception) -> str:
    """What an error of another library says, as a part of one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def read_fiddle_json(path: Path, *needed: str) -> dict[str, Any]:
    """The settings of one object in `io.json`, in which NeMo 2.0 keeps the arguments of objects as a graph (Fiddle's JSON).

    Args:
        path: the file.
        needed: settings by which the object is found.

    Raises:
        ValueError: the file cannot be read, or no object has these settings.
    """
    try:
        objects = parse_json(read_bounded(path, MAX_JSON_BYTES))["objects"].values()
        found = [_leaves(value["items"]) for value in objects if isinstance(value, dict) and "items" in value]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error).removeprefix(f'{path} ')}") from error
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
