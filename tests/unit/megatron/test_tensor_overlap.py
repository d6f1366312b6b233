"""User buffers: made for the packs of training, and out of the way of everything else."""

import importlib.metadata
import sys
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_opdlm.megatron import tensor_overlap
from nemo_opdlm.megatron.forward import RowSplit
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import ModelOptions
from nemo_opdlm.megatron.tensor_overlap import ForwardOverlap
from nemo_opdlm.testing import tiny


class Mode(Enum):
    NONE = "none"
    FP8 = "fp8"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What Transformer Engine is asked for."""
    found: list[dict[str, Any]] = []
    base = SimpleNamespace(UserBufferQuantizationMode=Mode, initialize_ub=lambda **given: found.append(given))
    for name in ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.module"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch.module.base", base)  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(
    ("version", "fp8", "kinds"),
    [
        ("2.6.0", None, {"use_fp8": False}),
        ("2.6.0", "hybrid", {"use_fp8": True}),
        ("2.9.0", None, {"quantization_modes": [Mode.NONE]}),
        ("2.9.0", "hybrid", {"quantization_modes": [Mode.FP8, Mode.NONE]}),
    ],
)
def test_the_buffers_hold_a_pack(
    version: str, fp8: str | None, kinds: dict[str, Any], calls: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    config = SimpleNamespace(hidden_size=64, fp8=fp8, tp_comm_bootstrap_backend="nccl")
    split = RowSplit(rank=1, num_ranks=2, multiple_of=32).filled_up_to(8200)
    assert split.multiple_of == 8192
    tensor_overlap.start(config, SimpleNamespace(tp_size=4), split.num_columns)  # type: ignore[arg-type]
    assert calls == [{"shape": [4096, 64], "tp_size": 4, "bootstrap_backend": "nccl", **kinds}]


def test_forward_passes_overlap_in_training_alone() -> None:
    column, row, other = (torch.nn.Module() for _ in range(3))
    column.ub_overlap_ag_fprop, column.ub_overlap_rs_fprop = True, False
    row.ub_overlap_ag_fprop, row.ub_overlap_rs_fprop = False, True
    overlap = ForwardOverlap([column, row, other])
    for is_training in (False, True, False, True):
        overlap.switch(is_training)
        assert (column.ub_overlap_ag_fprop, row.ub_overlap_rs_fprop) == (is_training, is_training)
        assert not column.ub_overlap_rs_fprop and not row.ub_overlap_ag_fprop
        assert not any(hasattr(other, name) for name in tensor_overlap.FORWARD_SWITCHES)


def test_a_network_switches_with_its_mode() -> None:
    network = tiny.random_network(
        tiny.architecture(), initialize(), options=ModelOptions(transformer_config={"tp_comm_overlap": True})
    )
    layer = network[0].decoder.layers[0].mlp.linear_fc2
    layer.ub_overlap_rs_fprop = True
    network._forward_overlap = ForwardOverlap(network.modules())
    torch.nn.ModuleDict({"around": network}).eval()
    assert network.training is layer.ub_overlap_rs_fprop is False
    network.train()
    assert network.training is layer.ub_overlap_rs_fprop is True
