"""Where NeMo 1.x, NeMo 2.0 and Megatron-Bridge keep settings, weights and tokenizer of a model."""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Never

from torch import Tensor

from nemo_opdlm.convert.hf_folder import GENERATION_CONFIG, TOKENIZER_FILES, read_json, read_tokenizer_files
from nemo_opdlm.convert.links import check_links, check_tree
from nemo_opdlm.convert.megatron_config import MEGATRON, NEMO_1
from nemo_opdlm.convert.megatron_import import MegatronModel
from nemo_opdlm.convert.megatron_tensors import DistributedWeights
from nemo_opdlm.convert.plain_settings import read_fiddle_json, read_yaml
from nemo_opdlm.convert.rank_files import FILE, RANK_FOLDER, RankFiles
from nemo_opdlm.data.bounded import read_bounded
from nemo_opdlm.megatron.pickle_guard import is_stored
from nemo_opdlm.megatron.safe_metadata import load_weights_only
from nemo_opdlm.models.archive_format import CONFIG, WEIGHTS, read_archive_config
from nemo_opdlm.models.safe_tar import ArchiveError

RUN_CONFIG = "run_config.yaml"
#: Beside the iterations of a Megatron-Bridge run: which is the latest.
TRACKERS = ("latest_train_state.pt", "latest_checkpointed_iteration.txt")
_ARTIFACT = re.compile(r"nemo:([0-9a-f]{32}_([^/\\]+))")


def check_nemo_1_members(path: Path, names: Iterable[str]) -> None:
    """Refuse a NeMo 1.x archive without weights that can be read, before it is extracted.

    Raises:
        ArchiveError: it holds zarr files, or no weights.
    """
    names = list(names)
    zarr = next((name for name in names if name.endswith(".zarray")), None)
    if zarr is not None:
        raise ArchiveError(
            f"{path}: {zarr} is of the zarr format, which left Megatron-core long ago; "
            "convert the archive with a NeMo container of its time"
        )
    if not any(re.match(rf"({WEIGHTS}/|{RANK_FOLDER}/|{re.escape(FILE)}$)", name) for name in names):
        raise ArchiveError(f"{path}: neither {WEIGHTS}/ nor {FILE} is there: the archive holds no weights")


def read_nemo_1(folder: Path, tokenizer: str | Path | None) -> MegatronModel:
    """The model in an extracted NeMo 1.x archive, whichever of the four ways its weights are stored in.

    Args:
        folder: the archive.
        tokenizer: folder of the tokenizer; None = the archive's own.

    Raises:
        ValueError: something is missing, damaged or unsafe; one line that names the file.
    """
    check_tree(folder)
    settings = read_archive_config(folder)
    section = _section(settings, "tokenizer")
    texts = [value for value in section.values() if isinstance(value, str)]
    artifacts = {match[2]: match[1] for match in map(_ARTIFACT.fullmatch, texts) if match}
    files = {name: folder / member for name, member in artifacts.items() if name in TOKENIZER_FILES}
    if tokenizer is None and "tokenizer.json" in files:
        missing = next((path for path in files.values() if not path.is_file()), None)
        if missing is not None:
            raise ArchiveError(f"{missing} is missing: the tokenizer is not complete")
        tokenizer_files: Mapping[str, bytes] = {name: path.read_bytes() for name, path in files.items()}
    else:
        tokenizer_files = find_tokenizer(folder / CONFIG, tokenizer, _paths(section.get("type")))
    is_distributed = (folder / WEIGHTS).is_dir()
    return MegatronModel(
        source=str(folder / WEIGHTS) if is_distributed else str(folder),
        settings_file=str(folder / CONFIG),
        settings=settings,
        dialect=NEMO_1,
        open_weights=(
            partial(DistributedWeights.open, folder / WEIGHTS)
            if is_distributed
            else lambda num_layers: RankFiles.open(folder, settings)
        ),
        tokenizer_files=tokenizer_files,
    )


def read_nemo_2(folder: Path, tokenizer: str | Path | None) -> MegatronModel:
    """The model in a NeMo 2.0 folder; arguments and errors as of `read_nemo_1`."""
    check_tree(folder)
    context = folder / "context"
    path, model = context / "model.yaml", {}
    if path.is_file():
        model = read_yaml(path)
        settings = _section(model, "config")
    else:
        path = context / "io.json"
        settings = read_fiddle_json(path, "num_layers", "hidden_size")
    named = _paths(_section(model, "tokenizer").get("pretrained_model_name"))
    folders = [context / "nemo_tokenizer", context / "tokenizer", folder / "tokenizer", *named]
    defaults = context / "artifacts" / GENERATION_CONFIG
    return MegatronModel(
        source=str(folder / "weights"),
        settings_file=str(path),
        settings=settings,
        dialect=MEGATRON,
        open_weights=partial(DistributedWeights.open, folder / "weights"),
        tokenizer_files=find_tokenizer(context, tokenizer, folders),
        generation_config=_numbers(read_json(defaults)) if defaults.is_file() else {},
    )


def read_bridge(folder: Path, tokenizer: str | Path | None) -> MegatronModel:
    """The model in a Megatron-Bridge iteration, or the latest of a run; arguments and errors as of `read_nemo_1`."""
    folder = _latest_iteration(folder)
    check_tree(folder)
    check_links(folder.parent, ["tokenizer"])
    path = folder / RUN_CONFIG
    run = read_yaml(path)
    settings = _section(run, "model")
    named = _paths(_section(run, "tokenizer").get("tokenizer_model"))
    return MegatronModel(
        source=str(folder),
        settings_file=str(path),
        settings=settings,
        dialect=MEGATRON,
        open_weights=partial(DistributedWeights.open, folder),
        tokenizer_files=find_tokenizer(folder, tokenizer, [folder / "tokenizer", folder.parent / "tokenizer", *named]),
        generation_config=_numbers(_section(_section(settings, "generation_config"), "config_dict")),
    )


def find_tokenizer(source: Path, given: str | Path | None, folders: Iterable[Path]) -> Mapping[str, bytes]:
    """The files of the given tokenizer, else of the first of some folders that holds one.

    Raises:
        ValueError: there is none.
    """
    if given is not None:
        return read_tokenizer_files(Path(given))
    for folder in folders:
        if any((folder / name).is_file() for name in TOKENIZER_FILES):
            return read_tokenizer_files(folder)
    refuse_without_tokenizer(source)


def refuse_without_tokenizer(source: Path) -> Never:
    """Say what to do about a checkpoint without a tokenizer.

    Raises:
        ArchiveError: always.
    """
    raise ArchiveError(
        f"{source} has no tokenizer (tokenizer.json): set model.tokenizer.type, or --tokenizer of the converter, to a "
        "folder with one"
    )


def _latest_iteration(folder: Path) -> Path:
    if (folder / RUN_CONFIG).is_file():
        return folder
    tracker = next(folder / name for name in TRACKERS if (folder / name).is_file())
    latest = _train_state_step(tracker) if tracker.suffix == ".pt" else _tracked_text(tracker)
    if not re.fullmatch(r"[0-9]{1,18}|release", latest):
        raise ArchiveError(f"{tracker} names no iteration: {latest[:40]!r}")
    name = latest if latest == "release" else f"iter_{int(latest):07d}"
    if not (folder / name / RUN_CONFIG).is_file():
        raise ArchiveError(f"{folder / name / RUN_CONFIG} is missing, although {tracker.name} names this iteration")
    return folder / name


def _tracked_text(path: Path) -> str:
    return read_bounded(path, 100).decode("utf-8", "replace").strip()


def _train_state_step(path: Path) -> str:
    state = load_weights_only(path, path)
    step = state.get("step") if isinstance(state, dict) else None
    if isinstance(step, Tensor) and is_stored(step) and step.numel() == 1:
        step = step.item()
    return str(step) if isinstance(step, int) and abs(step) < 10**18 else type(step).__name__


def _section(settings: Mapping[str, Any], key: str) -> dict[str, Any]:
    """A section of settings, empty where there is none."""
    section = settings.get(key)
    return section if isinstance(section, dict) else {}


def _numbers(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Generation defaults without anything but numbers and lists of token ids."""

    def is_plain(value: Any) -> bool:
        return isinstance(value, int | float) or (isinstance(value, list) and all(type(item) is int for item in value))

    return {key: value for key, value in defaults.items() if is_plain(value)}


def _paths(name: Any) -> list[Path]:
    """A tokenizer's name as a folder of this machine, which it may be; names of a hub are never asked for."""
    return [Path(name)] if isinstance(name, str) and name else []
