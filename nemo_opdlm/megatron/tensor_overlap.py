"""Communication of tensor parallelism behind its matrix products, by Transformer Engine's user buffers (`ub_tp_comm_overlap`).

The buffers hold one fixed number of tokens: training fills up every pack to it. Rollouts and held-out passes come in other
shapes, and go without; a network is in evaluation mode then.
"""

import importlib
import importlib.metadata
from collections.abc import Iterable

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from packaging.version import Version

from nemo_opdlm.megatron.parallel import ParallelContext

#: Switches of Transformer Engine's layers that are read in each of their forward passes.
FORWARD_SWITCHES = ("ub_overlap_ag_fprop", "ub_overlap_rs_fprop")
#: From this version on buffers are asked for by the kind of numbers that they hold.
_WITH_MODES = Version("2.7.0")


def start(config: TransformerConfig, parallel: ParallelContext, num_tokens: int) -> None:
    """Make the buffers of a network whose `tp_comm_overlap` is on; once in a process.

    Args:
        config: the network's.
        parallel: this process's place in the layout.
        num_tokens: of each training batch, on the tensor-parallel ranks together.
    """
    base = importlib.import_module("transformer_engine.pytorch.module.base")
    kinds: dict[str, object] = {"use_fp8": bool(config.fp8)}
    if Version(importlib.metadata.version("transformer-engine")) >= _WITH_MODES:
        modes = base.UserBufferQuantizationMode
        kinds = {"quantization_modes": [modes.FP8] * bool(config.fp8) + [modes.NONE]}
    base.initialize_ub(
        shape=[num_tokens, config.hidden_size],
        tp_size=parallel.tp_size,
        bootstrap_backend=config.tp_comm_bootstrap_backend,
        **kinds,
    )


class ForwardOverlap:
    """Switches the overlap of forward passes off, and back to what the layers were built with.

    Args:
        modules: of the network; those that have no such switch are left alone.
    """

    def __init__(self, modules: Iterable[torch.nn.Module]) -> None:
        self._built_with = [
            (module, name, getattr(module, name))
            for module in modules
            for name in FORWARD_SWITCHES
            if hasattr(module, name)
        ]

    def switch(self, is_training: bool) -> None:
        """Overlap in training alone."""
        for module, name, value in self._built_with:
            setattr(module, name, value and is_training)
