"""Trainer state is stored as plain values and comes back as such; anything else is named before it is written."""

import enum
import io
import threading
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from nemo_opdlm.lightning.trainer_state import TRAINER_STATE, load_trainer_state, save_trainer_state, to_plain


class Stage(enum.Enum):
    TRAIN = "train"


def test_state_comes_back_as_plain_values(tmp_path: Path) -> None:
    state = {
        "hyper_parameters": OmegaConf.create({"cfg": {"a": 1, "b": "${cfg.a}"}}),
        "dirpath": Path("/checkpoints"),
        "time": {Stage.TRAIN: np.float64(1.5)},
        "scores": [torch.tensor(0.25), float("inf"), None, True],
        "ids": (torch.arange(3), torch.bfloat16),
    }
    save_trainer_state(tmp_path, state)
    loaded = load_trainer_state(tmp_path)
    assert loaded["hyper_parameters"] == {"cfg": {"a": 1, "b": 1}}
    assert loaded["dirpath"] == "/checkpoints" and type(loaded["dirpath"]) is str
    assert loaded["time"] == {"train": 1.5} and type(loaded["time"]["train"]) is float
    assert loaded["scores"] == [torch.tensor(0.25), float("inf"), None, True]
    assert torch.equal(loaded["ids"][0], torch.arange(3)) and loaded["ids"][1] is torch.bfloat16


def test_part_of_a_larger_tensor_is_stored_by_itself(tmp_path: Path) -> None:
    save_trainer_state(tmp_path, {"row": torch.zeros(1000, 1000)[0]})
    assert (tmp_path / TRAINER_STATE).stat().st_size < 10_000


def test_values_that_would_overflow_the_stack_are_refused(tmp_path: Path) -> None:
    save_trainer_state(tmp_path, {})
    whole = zipfile.ZipFile(io.BytesIO((tmp_path / TRAINER_STATE).read_bytes()))
    nested_key = b"\x80\x04})" + b"\x85" * 10**6 + b"Ns."
    with zipfile.ZipFile(tmp_path / TRAINER_STATE, "w") as archive:
        for name in whole.namelist():
            archive.writestr(name, nested_key if name.endswith("data.pkl") else whole.read(name))
    with pytest.raises(ValueError, match=f"{TRAINER_STATE} is refused: .*tuples are nested"):
        load_trainer_state(tmp_path)


@pytest.mark.parametrize("value", [threading.Lock(), object(), Path.exists])
def test_objects_are_refused_by_place(value: Any) -> None:
    with pytest.raises(TypeError, match=r"checkpoint\.callbacks\.timer\[1\] is a"):
        to_plain({"callbacks": {"timer": [0, value]}})


@pytest.mark.parametrize(("content", "expected"), [(None, "is missing"), (b"", "is damaged"), (b"\x80\x04.", "is")])
def test_missing_and_damaged_files_are_named(tmp_path: Path, content: bytes | None, expected: str) -> None:
    if content is not None:
        (tmp_path / TRAINER_STATE).write_bytes(content)
    with pytest.raises(ValueError, match=f"{TRAINER_STATE} {expected}") as caught:
        load_trainer_state(tmp_path)
    assert "\n" not in str(caught.value)
