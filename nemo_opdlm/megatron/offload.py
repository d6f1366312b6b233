"""Weights of a frozen network that wait in host memory while nothing reads them."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


class HostWeights:
    """Frozen parameters whose only lasting copy lies in host memory, page-locked where there is a GPU.

    Args:
        parameters: they move to the host now, and are on their device again within ``on_device``.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = list(parameters)
        self._devices = [parameter.device for parameter in self._parameters]
        self._hosts = [_host_copy(parameter) for parameter in self._parameters]
        self._depth = 0
        self._release()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Have the weights on their device; may be nested."""
        if self._depth == 0:
            for parameter, host, device in zip(self._parameters, self._hosts, self._devices, strict=True):
                parameter.data = torch.empty_like(host, device=device).copy_(host, non_blocking=True)
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._release()

    def _release(self) -> None:
        # Frozen weights have not changed: nothing is copied back.
        for parameter, host in zip(self._parameters, self._hosts, strict=True):
            parameter.data = host


def _host_copy(parameter: Tensor) -> Tensor:
    host = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
    return host.copy_(parameter.detach())
