"""Runs Megatron-core unmodified on CPU and Gloo: the one place that redirects its requests for CUDA.

Megatron-core asks for CUDA by name in its schedules, gradient buffers, optimizers and checkpoints. On a machine without a GPU the
redirect below answers each such request with the CPU. It is installed once per process and never where a GPU is present.
"""

import contextlib
import warnings
from typing import Any

import megatron.core
import torch
from packaging.version import Version
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")
#: Versions that are accepted, those of pyproject.toml; the tests run against the one in constraints.txt.
TESTED = (Version("0.16.1"), Version("0.20"))

_TENSOR_CUDA, _TENSOR_TYPE = torch.Tensor.cuda, torch.Tensor.type

_active_mode: "CudaRequestsOnCpu | None" = None


def _asks_for_cuda(device: Any) -> bool:
    if isinstance(device, bool) or device is None:
        return False
    return isinstance(device, int) or str(device).startswith("cuda")


class CudaRequestsOnCpu(TorchFunctionMode):
    """Answers ``device="cuda"`` with the CPU and names CPU tensor types as Megatron's optimizer expects them."""

    # Called for every torch call of the process, some hundred times in a forward pass: nothing here is looked up twice.
    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Dispatch one torch call with its CUDA requests redirected."""
        if kwargs:
            if _asks_for_cuda(kwargs.get("device")):
                kwargs = {**kwargs, "device": CPU}
            return func(*args, **kwargs) if func is not _TENSOR_CUDA else args[0]
        if func is _TENSOR_CUDA:
            return args[0]
        if func is _TENSOR_TYPE and len(args) == 1:
            # Megatron's optimizer and clipping compare type strings with "torch.cuda.FloatTensor".
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args)


class _NoStream:
    """A CUDA stream where there is none: Megatron-core >= 0.19 orders its gradient reductions by streams."""

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> None: ...

    def synchronize(self) -> None: ...


def wants_cpu() -> bool:
    """Whether Megatron has to run without a GPU."""
    return not torch.cuda.is_available()


def run_megatron_on_cpu() -> None:
    """Install the redirect for this process if there is no GPU; calling it again does nothing.

    Raises:
        RuntimeError: the installed megatron-core lies outside the range that the redirect was checked with.
    """
    global _active_mode
    if _active_mode is not None or not wants_cpu():
        return
    version = Version(megatron.core.__version__)
    if not TESTED[0] <= version < TESTED[1]:
        raise RuntimeError(
            f"megatron-core {version} on CPU is untested: install megatron-core>={TESTED[0]},<{TESTED[1]}."
        )
    import megatron.core.tensor_parallel.random as megatron_random

    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.current_stream = lambda *args, **kwargs: _NoStream()  # type: ignore[assignment]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    # Activation recomputation saves and restores CUDA's generator. Dropout is 0 here, so there is nothing to restore.
    megatron_random._get_cuda_rng_state = lambda *args, **kwargs: torch.zeros(1, dtype=torch.uint8)
    megatron_random._set_cuda_rng_state = lambda *args, **kwargs: None
    warnings.filterwarnings(
        "ignore", message=".*(all_gather_into_tensor|reduce_scatter_tensor|_base).*", module="megatron"
    )
    _active_mode = CudaRequestsOnCpu()
    _active_mode.__enter__()


def without_redirect() -> contextlib.AbstractContextManager[Any]:
    """Leave torch's calls alone where Megatron asks for nothing but what the patched functions above answer.

    The redirect takes a microsecond or two of every call: a tenth of a rollout's time, whose forwards are small.
    """
    # Modes and subclasses, of which there are none here, are one thing to torch.
    return contextlib.nullcontext() if _active_mode is None else torch._C.DisableTorchFunction()


def remove_redirect() -> None:
    """Leave the tensor redirect again (the tests show with it that nothing but the redirect makes Megatron run)."""
    global _active_mode
    if _active_mode is not None:
        _active_mode.__exit__(None, None, None)
        _active_mode = None
