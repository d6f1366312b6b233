"""What Lightning puts into a checkpoint besides weights, reduced to plain containers and tensors.

A checkpoint written so is read back without unpickling objects (torch's `weights_only`).
"""

import enum
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from nemo_opdlm.megatron.safe_metadata import load_weights_only
from nemo_opdlm.megatron.sharded_write import save_plain

TRAINER_STATE = "trainer_state.pt"


def save_trainer_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Write `trainer_state.pt`.

    Raises:
        TypeError: the state holds an object that is no plain value; the message says where.
        OSError: it cannot be written, or the disk is full.
    """
    save_plain(directory / TRAINER_STATE, to_plain(state))


def load_trainer_state(directory: Path) -> dict[str, Any]:
    """Read `trainer_state.pt` with its tensors on the CPU.

    Raises:
        ValueError: it is missing, damaged, or holds more than plain data; one line that names the file.
    """
    path = directory / TRAINER_STATE
    if not path.is_file():
        raise ValueError(f"{path} is missing: {directory} is no checkpoint of a training run")
    state = load_weights_only(path, path)
    if not isinstance(state, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(state).__name__}")
    return state


def to_plain(value: Any, where: str = "checkpoint") -> Any:
    """Copy a structure into plain containers, numbers, texts and CPU tensors.

    Args:
        value: containers (OmegaConf's too), numbers (numpy's too), texts, paths, enums, tensors.
        where: how an error names this value.

    Raises:
        TypeError: something else is in it.
    """
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in (bool, int, float, str, torch.dtype):
        return value
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Path | str):
        return str(value)
    if isinstance(value, Mapping):
        return {to_plain(key, f"{where} key"): to_plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [to_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    raise TypeError(
        f"{where} is a {type(value).__name__}: checkpoints hold plain containers, numbers, texts and tensors"
    )
