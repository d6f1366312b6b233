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
#: libyaml's, where PyYAML was built with it: ten times as fast.
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _InertLoader(_SafeLoader):  # type: ignore[misc]
    """YAML whose unknown tags become the plain value below them, or the tag's own text where that is empty."""

    def plain(self, node: yaml.Node) -> Any:
        """The value of a node with an unknown tag."""
        if isinstance(node, yaml.MappingNode):
            return self.construct_mapping(node, deep=True)
        if isinstance(node, yaml.SequenceNode):
            return self.construct_sequence(node, deep=True)
        return self.construct_scalar(node) or node.tag


_InertLoader.add_constructor(None, _InertLoader.plain)


def check_yaml(text: str) -> None:
    """Refuse a YAML text that would explode when it is read: aliases of aliases, or nesting without end.

    Raises:
        ValueError: it would.
        yaml.YAMLError: it is no YAML.
    """
    totals, anchors = [0], {}  # values of each open collection, and of each anchored one
    names: list[str | None] = []
    for event in yaml.parse(text, _SafeLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            names.append(event.anchor)
            totals.append(1)
        elif isinstance(event, yaml.CollectionEndEvent):
            count, name = totals.pop(), names.pop()
            totals[-1] += count
            if name is not None:
                anchors[name] = count
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor in names:
                raise ValueError(f"the alias *{event.anchor[:40]} stands in what it is an alias of")
            totals[-1] += anchors.get(event.anchor, 1)
        else:
            totals[-1] += 1
        if totals[-1] > MAX_YAML_VALUES:
            raise ValueError(f"it has more than {MAX_YAML_VALUES} values, aliases written out")
        if len(totals) > MAX_YAML_DEPTH:
            raise ValueError(f"it is nested more than {MAX_YAML_DEPTH} deep")


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


def one_line(error: BaseException) -> str:
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
