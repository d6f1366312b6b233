"""Precision: what FP8 and Transformer Engine's layers need of the other keys, of the machine and of the network."""

import importlib.metadata
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from packaging.version import Version

from nemo_opdlm.config.architecture import Architecture
from nemo_opdlm.config.schema import Config


@dataclass(frozen=True)
class RecipeNeeds:
    """What Transformer Engine asks for one way of scaling FP8.

    Attributes:
        capability: compute capability of the GPU, at least.
        version: of Transformer Engine that Megatron uses it with, at least.
        multiple: of which the tokens of a matrix product and the widths of the network have to be, on each rank.
    """

    capability: tuple[int, int]
    version: str
    multiple: int


#: By `model.fp8_recipe`.
FP8_RECIPES = {
    "delayed": RecipeNeeds((8, 9), "1.0", 16),
    "tensorwise": RecipeNeeds((8, 9), "2.2", 16),
    "blockwise": RecipeNeeds((9, 0), "2.3", 16),
    "mxfp8": RecipeNeeds((10, 0), "2.1", 32),
}


@dataclass(frozen=True)
class Machine:
    """What precision depends on here.

    Attributes:
        transformer_engine: its version, "" if it does not tell; None without it.
        capability: compute capability of the first GPU, None where the run uses none.
    """

    transformer_engine: str | None
    capability: tuple[int, int] | None

    def __str__(self) -> str:
        engine = "no Transformer Engine" if self.transformer_engine is None else f"version {self.transformer_engine}"
        gpu = "no GPU" if self.capability is None else f"a GPU of {_dotted(self.capability)}"
        return f"{engine} and {gpu}"


#: The machine that a configuration is checked for, where it is not this one.
_ELSEWHERE: ContextVar[Machine | None] = ContextVar("elsewhere", default=None)


@contextmanager
def assume_capable_gpus() -> Iterator[None]:
    """Check configurations for a cluster whose GPUs and Transformer Engine cannot be asked from here."""
    token = _ELSEWHERE.set(Machine("", (99, 0)))
    try:
        yield
    finally:
        _ELSEWHERE.reset(token)


def find_machine(accelerator: str) -> Machine:
    """Look at the machine of a run with this `trainer.accelerator`: this one, unless another is assumed."""
    if accelerator != "cpu" and (elsewhere := _ELSEWHERE.get()) is not None:
        return elsewhere
    version = None
    if importlib.util.find_spec("transformer_engine") is not None:
        try:
            version = importlib.metadata.version("transformer-engine")
        except importlib.metadata.PackageNotFoundError:
            version = ""
    if accelerator == "cpu":
        return Machine(version, None)
    import torch  # takes longer than all other checks

    return Machine(version, torch.cuda.get_device_capability() if torch.cuda.is_available() else None)


def check_precision(config: Config) -> None:
    """Check the keys of precision with each other, then with this machine.

    Raises:
        ValueError: they contradict each other, or ask for what is not there. Megatron alone would leave FP8 out.
    """
    model, precision = config.model, config.trainer.precision
    if model.megatron_amp_O2 and precision == "32":
        raise ValueError("model.megatron_amp_O2=True contradicts trainer.precision='32'; use 'bf16'")
    if model.fp8:
        _check_fp8_keys(config)
    elif model.fp8_params:
        raise ValueError("model.fp8_params=True needs model.fp8=True")
    if model.ub_tp_comm_overlap:
        _check_user_buffers(config)
    if model.transformer_engine:
        _check_machine(config, find_machine(config.trainer.accelerator))


def check_fp8_sizes(config: Config, arch: Architecture) -> None:
    """Check that FP8's matrix products have the widths that their recipe needs.

    Raises:
        ValueError: a width of the network, split by tensor parallelism, is no multiple of it.
    """
    model = config.model
    if not model.fp8:
        return
    multiple, tp = FP8_RECIPES[model.fp8_recipe].multiple, model.tensor_model_parallel_size
    assert arch.kv_channels is not None and arch.num_query_groups is not None
    heads, groups, width = arch.num_attention_heads, arch.num_query_groups, arch.kv_channels
    sizes = {
        "hidden_size": arch.hidden_size,
        f"ffn_hidden_size / {tp}": arch.ffn_hidden_size // tp,
        f"num_attention_heads x kv_channels / {tp}": heads * width // tp,
        f"(num_attention_heads + 2 x num_query_groups) x kv_channels / {tp}": (heads + 2 * groups) * width // tp,
    }
    uneven = [f"{name} = {size}" for name, size in sizes.items() if size % multiple]
    if uneven:
        raise ValueError(
            f"model.fp8=True with fp8_recipe={model.fp8_recipe!r} needs sizes that are multiples of {multiple}, but "
            + " and ".join(uneven)
        )


def _check_fp8_keys(config: Config) -> None:
    model = config.model
    if model.fp8_e4m3 == model.fp8_hybrid:
        raise ValueError(
            f"model.fp8=True needs one of model.fp8_e4m3={model.fp8_e4m3} and model.fp8_hybrid={model.fp8_hybrid}"
        )
    if not model.transformer_engine:
        raise ValueError("model.fp8=True needs model.transformer_engine=True: Megatron's own layers ignore FP8")
    if model.fp8_recipe == "mxfp8" and not model.fp8_e4m3:
        raise ValueError("model.fp8_recipe='mxfp8' needs model.fp8_e4m3=True")
    if model.first_last_layers_bf16 and model.fp8_recipe == "delayed":
        raise ValueError("model.first_last_layers_bf16=True contradicts model.fp8_recipe='delayed'; use 'tensorwise'")
    if model.fp8_params and not model.optim.distributed:
        raise ValueError(
            f"model.fp8_params=True contradicts model.optim.name={model.optim.name!r}: FP8 weights need a sharded "
            "optimizer; use 'distributed_fused_adam'"
        )


def _check_user_buffers(config: Config) -> None:
    model, key = config.model, "model.ub_tp_comm_overlap=True"
    if not model.transformer_engine:
        raise ValueError(f"{key} needs model.transformer_engine=True: the user buffers are Transformer Engine's")
    if model.opdlm.pack_to_tokens is None:
        raise ValueError(f"{key} needs model.opdlm.pack_to_tokens: the user buffers hold one fixed number of tokens")
    if config.trainer.precision == "32":
        raise ValueError(f"{key} contradicts trainer.precision='32': the user buffers hold bf16; use 'bf16'")


def _check_machine(config: Config, machine: Machine) -> None:
    model = config.model
    if not model.fp8:
        if machine.transformer_engine is None or machine.capability is None:
            raise ValueError(f"model.transformer_engine=True needs Transformer Engine and a GPU: found {machine}")
        return
    needs = FP8_RECIPES[model.fp8_recipe]
    is_too_old = machine.transformer_engine and Version(machine.transformer_engine) < Version(needs.version)
    if machine.transformer_engine is None or is_too_old or (machine.capability or (0, 0)) < needs.capability:
        raise ValueError(
            f"model.fp8=True with fp8_recipe={model.fp8_recipe!r} needs Transformer Engine {needs.version} or newer and a "
            f"GPU of compute capability {_dotted(needs.capability)} or more: found {machine}"
        )


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(str(part) for part in capability)
