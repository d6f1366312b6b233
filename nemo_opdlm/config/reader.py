"""Strict reader of configurations: no key is unknown, no value is converted.

OmegaConf's structured configs would turn 1 into true and 4.5 into "4.5", let `+key` add any key, and refuse overrides
below a null section. So Hydra composes plain values and this reader holds them against the dataclasses' annotations.
"""

import difflib
import math
import types
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_opdlm.config.foreign import RENAMED, drop_foreign_keys
from nemo_opdlm.config.schema import Config
from nemo_opdlm.data.shown import plain as _named
from nemo_opdlm.data.shown import shortened, shown

T = TypeVar("T")


def parse(
    config: DictConfig | Mapping[str, Any],
    schema: type[T] = Config,  # type: ignore[assignment]
    section: str = "",
) -> T:
    """Read a composed configuration into the dataclass `schema`; absent keys get their defaults.

    Keys of other NeMo versions that have no effect here are dropped with one warning (see `foreign.py`).

    Args:
        config: what Hydra composed, or any mapping.
        schema: dataclass of the configuration's keys.
        section: where `config` was taken from, e.g. `model` with `schema=ModelConfig`; full keys start with it.

    Raises:
        ValueError: one line naming the full key, its value and what is allowed.
    """
    known = tuple(full_keys(schema, f"{section}." if section else ""))
    result = _read_section(drop_foreign_keys(_plain(config), section), schema, section, known)
    assert isinstance(result, schema)
    return result


def to_container(config: Any) -> Any:
    """A configuration dataclass as plain dicts and lists, e.g. for YAML or another schema."""
    if is_dataclass(config):
        return {field.name: to_container(getattr(config, field.name)) for field in fields(config)}
    if isinstance(config, Mapping):
        return {key: to_container(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_container(value) for value in config]
    return config


def to_dictconfig(config: Any) -> DictConfig:
    """A configuration dataclass as a DictConfig, as NeMo's ModelPT and exp_manager expect it."""
    plain: dict[str, Any] = to_container(config)
    return OmegaConf.create(plain)


def full_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Every key of a schema with its sections, e.g. `model.opdlm.block_size`."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        key = prefix + field.name
        yield key
        if is_dataclass(section := hints[field.name]):
            assert isinstance(section, type)
            yield from full_keys(section, key + ".")


def unknown_key(key: str, known: tuple[str, ...]) -> str:
    """The message about a key that is not one of the `known` full keys, with the closest one that is."""
    suggestion = _closest_key(key, known)
    hint = f"; did you mean {suggestion}?" if suggestion else ""
    if not suggestion and key.startswith("model.") and key.count(".") == 1:
        hint = "; further fields of Megatron's TransformerConfig go under model.mcore_customization_config"
    return f"{_named(key)} is not a key of this configuration{hint}"


def _closest_key(key: str, known: tuple[str, ...]) -> str | None:
    parent, _, leaf = key.rpartition(".")
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    if renamed := RENAMED.get(key) or RENAMED.get(leaf):
        return renamed
    if close := difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.75):
        return siblings[close[0]]
    if elsewhere := [k for k in known if k.rpartition(".")[2] == leaf]:
        return min(elsewhere, key=len)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    return close[0] if close else None


def _plain(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    try:
        if not isinstance(config, DictConfig):
            config = OmegaConf.create(dict(config))
        plain = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        reason = (str(error.msg or error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{_named(error.full_key or 'configuration')}: {shortened(reason)}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"the configuration cannot be read: {shortened(' '.join(str(error).split()))}") from None
    except RecursionError:
        raise ValueError("the configuration is nested too deeply, or refers to itself") from None
    if not isinstance(plain, dict):
        raise ValueError(f"a configuration must be a mapping of keys, got {type(plain).__name__}")
    return {str(key): value for key, value in plain.items()}


def _read_section(value: Any, schema: type, key: str, known: tuple[str, ...]) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{key}={shown(value)} must be a section of keys, such as {fields(schema)[0].name}")
    hints, prefix = get_type_hints(schema), f"{key}." if key else ""
    for name in value:
        if name not in hints:
            raise ValueError(unknown_key(f"{prefix}{name}", known))
    return schema(**{name: _read(item, hints[name], prefix + name, known) for name, item in value.items()})


def _read(value: Any, annotation: Any, key: str, known: tuple[str, ...]) -> Any:
    if is_dataclass(annotation):
        assert isinstance(annotation, type)
        return _read_section(value, annotation, key, known)
    accepted, result = _match(value, annotation)
    if accepted:
        return result
    closest = _closest_choice(value, annotation)
    hint = f"; did you mean {closest!r}?" if closest else ""
    raise ValueError(f"{key}={shown(value)} must be {_describe(annotation)}{hint}")


def _match(value: Any, annotation: Any) -> tuple[bool, Any]:
    """Whether `value` is of the annotated type, and the value to store."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation is Any:
        return True, value
    if origin in (Union, types.UnionType):
        return next((match for match in (_match(value, arg) for arg in args) if match[0]), (False, None))
    if origin is Literal:
        # YAML reads `precision: 32` as a number.
        text = shown(value) if isinstance(value, int) and not isinstance(value, bool) else value
        return next(((True, choice) for choice in args if choice == text), (False, None))
    if origin is tuple:
        return _match_sequence(value, args)
    if origin is dict:
        return _match_mapping(value, args)
    if annotation is types.NoneType:
        return value is None, None
    if annotation is bool or annotation is str:
        return isinstance(value, annotation), value
    if isinstance(value, bool):
        return False, None
    if annotation is int:
        return isinstance(value, int) and abs(value) < 2**63, value
    assert annotation is float, annotation
    try:
        finite = isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        finite = False
    return finite, float(value) if finite else None


def _match_sequence(value: Any, args: tuple[Any, ...]) -> tuple[bool, Any]:
    if not isinstance(value, (list, tuple)):
        return False, None
    items = (args[0],) * len(value) if args[-1] is Ellipsis else args
    if len(items) != len(value):
        return False, None
    matches = [_match(item, annotation) for item, annotation in zip(value, items, strict=True)]
    return all(ok for ok, _ in matches), tuple(item for _, item in matches)


def _match_mapping(value: Any, args: tuple[Any, ...]) -> tuple[bool, Any]:
    if not isinstance(value, Mapping):
        return False, None
    matches = {key: _match(item, args[1]) for key, item in value.items()}
    keys_match = all(_match(key, args[0])[0] for key in value)
    return keys_match and all(ok for ok, _ in matches.values()), {key: item for key, (_, item) in matches.items()}


def _describe(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(arg) for arg in args)
    if origin is Literal:
        return ("one of " if len(args) > 1 else "") + ", ".join(repr(arg) for arg in args)
    if origin is tuple:
        count = "" if args[-1] is Ellipsis else f"{len(args)} times "
        return f"a list of {count}{_describe(args[0])}"
    if origin is dict:
        return f"a mapping from {_describe(args[0])} to {_describe(args[1])}"
    names = {bool: "true or false", int: "an integer", float: "a number", str: "text", types.NoneType: "null"}
    return names.get(annotation, "anything")


def _closest_choice(value: Any, annotation: Any) -> str | None:
    members = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    choices = [choice for arg in members if get_origin(arg) is Literal for choice in get_args(arg)]
    close = difflib.get_close_matches(value if isinstance(value, str) else shown(value), choices, n=1, cutoff=0.5)
    return str(close[0]) if close else None
