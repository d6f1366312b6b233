"""Weights that NeMo 1.x wrote with `torch.save`: in one file, or in one file per tensor- and pipeline-parallel rank."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_opdlm.convert.families import Shape
from nemo_opdlm.convert.megatron_config import Settings, parallel_size
from nemo_opdlm.convert.megatron_tensors import cut_axis, join_shards, own_names, weight_prefix
from nemo_opdlm.data.shown import plain, shown
from nemo_opdlm.megatron.pickle_guard import is_stored, is_zip
from nemo_opdlm.megatron.safe_metadata import load_weights_only

FILE = "model_weights.ckpt"
#: Folder of one rank: tensor-parallel only, or both.
RANK_FOLDER = r"(mp_rank_\d+|tp_rank_\d+_pp_rank_\d+)"
_MOST_RANKS = 4096
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.")


@dataclass
class RankFiles:
    """The weights in such files; the files are mapped, so that only tensors that are read are in memory.

    Attributes:
        stages: files of each pipeline stage, by tensor-parallel rank.
        places: our name -> (stage, key in its files).
        shapes: our name -> shape.
        dtypes: our name -> type.
    """

    stages: list[list[Path]]
    places: dict[str, tuple[int, str]] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    _mapped: dict[Path, dict[str, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def open(folder: Path, settings: Settings) -> "RankFiles":
        """Find the files, map them and compare them with each other.

        Args:
            folder: an extracted archive.
            settings: of the model; they say how many ranks wrote it.

        Raises:
            ValueError: a file is missing, damaged, unsafe or unlike the others; one line that names it.
        """
        files = RankFiles(_find(folder, settings))
        prefix = weight_prefix(files._load(files.stages[0][0]), str(files.stages[0][0]))
        first_layer = 0
        for stage, paths in enumerate(files.stages):
            keys = own_names(files._load(paths[0]), prefix)
            files._check_alike(paths, keys.values())
            for name, key in keys.items():
                files._add(_renumbered(name, first_layer), stage, key)
            first_layer += len({found[1] for found in map(_LAYER.match, keys) if found})
        return files

    def read(self, name: str) -> Tensor:
        """One tensor, joined from the shards of all ranks."""
        stage, key = self.places[name]
        return join_shards(name, [self._load(path)[key] for path in self.stages[stage]])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    def _add(self, name: str, stage: int, key: str) -> None:
        shard, axis = self._load(self.stages[stage][0])[key], cut_axis(name)
        ranks = len(self.stages[stage])
        self.places[name], self.dtypes[name] = (stage, key), shard.dtype
        self.shapes[name] = tuple(size * ranks if i == axis else size for i, size in enumerate(shard.shape))

    def _check_alike(self, paths: list[Path], keys: Iterable[str]) -> None:
        for key in keys:
            shape = self._load(paths[0])[key].shape
            for path in paths[1:]:
                other = self._load(path).get(key)
                if other is None:
                    raise ValueError(f"{path}: tensor {key} is missing, {paths[0].parent.name} has it")
                if other.shape != shape:
                    first = paths[0].parent.name
                    raise ValueError(f"{path}: tensor {key} has shape {list(other.shape)}, in {first} {list(shape)}")

    def _load(self, path: Path) -> dict[str, Tensor]:
        if path not in self._mapped:
            # Files of torch < 1.6 are no zip files and cannot be mapped.
            loaded = load_weights_only(path, path, mmap=is_zip(path))
            if not isinstance(loaded, dict):
                raise ValueError(f"{path} holds a {type(loaded).__name__} instead of a model's tensors")
            tensors = {str(key): value for key, value in loaded.items() if isinstance(value, Tensor)}
            claimed = next((key for key, value in tensors.items() if not is_stored(value)), None)
            if claimed is not None:
                raise ValueError(f"{path}: tensor {plain(claimed)} is larger than what is stored of it, or not dense")
            self._mapped[path] = tensors
        return self._mapped[path]


def _renumbered(name: str, first_layer: int) -> str:
    """Layers are numbered within their stage."""
    return _LAYER.sub(lambda found: f"decoder.layers.{first_layer + int(found[1])}.", name)


def _find(folder: Path, settings: Settings) -> list[list[Path]]:
    if (folder / FILE).is_file():
        return [[folder / FILE]]
    virtual = settings.get("virtual_pipeline_model_parallel_size")
    if virtual not in (None, 1):
        raise ValueError(
            f"{folder}: virtual_pipeline_model_parallel_size={shown(virtual)} is not supported for one file per rank"
        )
    try:
        tensor, pipeline = parallel_size(settings, "tensor"), parallel_size(settings, "pipeline")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    if tensor * pipeline > _MOST_RANKS:
        raise ValueError(
            f"{folder}: {tensor * pipeline} files of weights are more than the {_MOST_RANKS} that are read"
        )
    if pipeline == 1:
        stages = [[folder / f"mp_rank_{rank:02d}" / FILE for rank in range(tensor)]]
    else:
        stages = [
            [folder / f"tp_rank_{rank:02d}_pp_rank_{stage:03d}" / FILE for rank in range(tensor)]
            for stage in range(pipeline)
        ]
    expected = {path for paths in stages for path in paths}
    layout = f"tensor_model_parallel_size={tensor}, pipeline_model_parallel_size={pipeline}"
    for path in sorted(expected):
        if not path.is_file():
            raise ValueError(f"{path} is missing: the model was saved with {layout}")
    found = (path for path in folder.glob(f"*/{FILE}") if re.fullmatch(RANK_FOLDER, path.parent.name))
    for path in sorted(found):
        if path not in expected:
            raise ValueError(f"{path} is one file too many: the model was saved with {layout}")
    return stages
