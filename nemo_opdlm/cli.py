"""Hydra entry points with the behaviour of NeMo's `hydra_runner`, minus its import of NeMo.

`--help`, `--cfg job` and every configuration error come before NeMo, Megatron or torch are imported.
"""

import functools
import inspect
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NoReturn, TypeVar

import hydra
import hydra.version

# Hydra has no public way to expand a sweep without running it here.
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

# Nor to put overrides behind the user's; NeMo's hydra_runner uses the same two functions.
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import OverrideParseException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf

from nemo_opdlm.config import Config, full_keys, groups, parse, to_container, unknown_key, validate

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_PACKAGE = Path(__file__).resolve().parent
#: The folder of configurations: inside the package where that is installed, beside it in a source checkout.
CONF = next(folder for folder in (_PACKAGE / "conf", _PACKAGE.parent / "conf") if folder.is_dir())
_HYDRA_DEFAULTS = ["hydra.output_subdir=null", "hydra/job_logging=stdout", "hydra.run.dir=."]
_FULL_ERROR = "HYDRA_FULL_ERROR"
_HYDRA_VERSION = "1.3"
_REFUSED_OVERRIDE = re.compile(
    r"(?:In '([^']*)': )?Could not (?:override|delete from config|append to config)[^']*'([^']+)'"
)


@dataclass(frozen=True)
class Point(Generic[T_co]):
    """One run of a sweep.

    Attributes:
        swept: what tells it from the others, key -> value as written.
        config: checked.
    """

    swept: Mapping[str, str]
    config: T_co


def main(
    config_name: str,
    schema: type[T] = Config,  # type: ignore[assignment]
    check: Callable[[T], T] = validate,  # type: ignore[assignment]
    config_path: str | Path = CONF,
    sweep: Callable[[str, Sequence[Point[T]]], int] | None = None,
) -> Callable[[Callable[[T], None]], Callable[[], None]]:
    """Decorator: call a function with the checked configuration that the command line composes.

    A mistake of the user, that is a ValueError or OSError raised by this package or by the decorated function itself,
    ends the program with one line on stderr and exit code 2. With HYDRA_FULL_ERROR=1 in the environment it is a
    traceback instead.

    Args:
        config_name: a file of `config_path`, without `.yaml`, whose defaults list starts with `schema`.
        schema: dataclass of the keys and their defaults.
        check: checks and corrects what was read.
        config_path: folder of configurations.
        sweep: what `--multirun` calls, with the script's path and the runs, all of which are right; returns the exit
            code. None = the script knows no `--multirun`.
    """

    def decorator(task: Callable[[T], None]) -> Callable[[], None]:
        known = tuple(full_keys(schema))
        own_code = (_PACKAGE, Path(inspect.getfile(task)).resolve())

        @functools.wraps(task)
        def entry_point() -> None:
            wanted = os.environ.get(_FULL_ERROR, "0")
            os.environ[_FULL_ERROR] = "1"  # otherwise Hydra prints errors of the composition its own way and exits
            started = False

            def reported(work: Callable[[], None]) -> None:
                nonlocal started
                started = True
                os.environ[_FULL_ERROR] = wanted
                try:
                    work()
                except (ValueError, OSError) as error:
                    if wanted == "1" or not _raised_by(error.__traceback__, own_code):
                        raise
                    _exit(str(error))

            def run(composed: DictConfig) -> None:
                groups.refuse_strays(composed, known, CONF)
                config = check(parse(composed, schema))
                if isinstance(config, Config):
                    hide_gpus(config)
                task(config)

            @functools.wraps(task)  # Hydra names the job after this function's file
            def job(composed: DictConfig) -> None:
                reported(lambda: run(composed))

            _register(schema)
            parser = get_args_parser()
            try:
                # Intermixed: overrides may stand on both sides of an option.
                args = _adapted(parser.parse_intermixed_args())
                if args.multirun:
                    points = _points(args, config_name, schema, check, config_path, sweep is not None)
                    assert sweep is not None
                    reported(lambda: sys.exit(sweep(inspect.getfile(task), points)))
                args.overrides = [*args.overrides, *_HYDRA_DEFAULTS]
                hydra.version.setbase(_HYDRA_VERSION)
                _run_hydra(args, parser, job, str(config_path), config_name)
            except Exception as error:
                if started or wanted == "1":
                    raise
                _exit(_composition_message(error, known))

        return entry_point

    return decorator


def hide_gpus(config: Config) -> None:
    """Where `trainer.accelerator` is `cpu`, let this process see no GPU: Megatron asks for CUDA wherever there is one."""
    if config.trainer.accelerator == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def compose(
    config_name: str,
    overrides: Sequence[str] = (),
    schema: type = Config,
    config_path: str | Path = CONF,
) -> DictConfig:
    """What the command line `overrides` would compose; `parse` and `validate` make a checked configuration of it."""
    _register(schema)
    with hydra.initialize_config_dir(str(Path(config_path).resolve()), version_base=_HYDRA_VERSION):
        return hydra.compose(config_name, groups.with_added_choices(overrides, CONF))


def _points(
    args: Namespace,
    config_name: str,
    schema: type[T],
    check: Callable[[T], T],
    config_path: str | Path,
    has_sweep: bool,
) -> list[Point[T]]:
    """Every run of a command line with `--multirun`, checked before any starts.

    Raises:
        ValueError, OSError, HydraException: a run or the command line is wrong.
    """
    if not has_sweep:
        raise ValueError("this script knows no --multirun")
    if args.cfg or args.config_dir:
        option = "--cfg" if args.cfg else "--config-dir"
        raise ValueError(f"{option} does not go with --multirun")
    overrides = OverridesParser.create().parse_overrides(args.overrides)
    swept = {override.get_key_element() for override in overrides if override.is_sweep_override()}
    if not swept:
        raise ValueError("--multirun needs a key with several values, such as model.opdlm.block_size=4,8")
    points = []
    for combination in BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]:
        chosen = dict(override.split("=", 1) for override in combination)
        here = {key.lstrip("+"): value for key, value in chosen.items() if key in swept}
        composed = compose(args.config_name or config_name, combination, schema, args.config_path or config_path)
        try:
            groups.refuse_strays(composed, tuple(full_keys(schema)), CONF)
            points.append(Point(here, check(parse(composed, schema))))
        except ValueError as error:
            raise ValueError(f"{', '.join(f'{key}={value}' for key, value in here.items())}: {error}") from error
    return points


def _adapted(args: Namespace) -> Namespace:
    """The arguments as Hydra has to be given them."""
    args.overrides = groups.with_added_choices(args.overrides, CONF)
    if args.config_path is not None and "://" not in args.config_path:
        args.config_path = str(
            Path(args.config_path).resolve()
        )  # Hydra would look beside the script, wherever that lies
    return args


class _OurGroups(SearchPathPlugin):
    """Lets a user's own file extend `gpt_opdlm` and choose from its groups, wherever the file lies."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("nemo_opdlm", f"file://{CONF}")


def _register(schema: type) -> None:
    """Put the schema's defaults into Hydra's store as plain values, and register the resolvers NeMo users know."""
    Plugins.instance().register(_OurGroups)
    ConfigStore.instance().store(name="schema", node=to_container(schema()))
    resolvers: dict[str, Callable[..., Any]] = {
        "multiply": lambda x, y: x * y,
        "sum": lambda x, y: x + y,
        "int_div": lambda x, y: x // y,
        "divide_floor": lambda x, y: x // y,
        "divide_ceil": lambda x, y: -(-x // y),
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def _raised_by(trace: TracebackType | None, own_code: tuple[Path, ...]) -> bool:
    """Whether the innermost frame is ours. The one line of another package's error would not name the culprit."""
    assert trace is not None
    while trace.tb_next is not None:
        trace = trace.tb_next
    file = Path(trace.tb_frame.f_code.co_filename).resolve()
    return any(file == own or own in file.parents for own in own_code)


def _composition_message(error: Exception, known: tuple[str, ...]) -> str:
    if (choice := groups.unknown_choice(str(error), CONF)) is not None:
        return choice
    text = " ".join(str(error).split()).partition(" Config search path:")[0]
    if isinstance(error, OverrideParseException):
        return f"cannot read the override {error.override!r}: {text}"
    refused = _REFUSED_OVERRIDE.match(text)
    if refused is None:
        return text
    (file, key), choices = refused.groups(), groups.read_groups(CONF)
    where = groups.place(file)
    if (misplaced := groups.misplaced(key, known)) is not None:
        return where + misplaced
    if key in choices:
        return f"{where}{key} is a group of configurations: write +{key}=..., one of {', '.join(choices[key])}"
    if key in known:
        return (
            f"{where}{key} is not in the configuration file; write +{key}=..., or start its defaults list with `schema`"
        )
    return where + unknown_key(key, (*known, *choices))


def _exit(message: str) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(2)
