"""What tensors a piece of code allocates, by watching every operator: exact, and the same on every machine."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class AllocationProfile(TorchDispatchMode):
    """Watches the storages that operators return inside the context, in forward and backward passes.

    Attributes:
        peak_bytes: most bytes of them alive at a time.
        shapes: of all tensors.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak_bytes = 0
        self.shapes: set[tuple[int, ...]] = set()
        self._alive: dict[int, int] = {}
        self._bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note what it returns."""
        result = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_iter(result):
            if isinstance(x, Tensor) and x.device.type != "meta":
                self.shapes.add(tuple(x.shape))
                self._note(x.untyped_storage(), known)
        return result

    def _note(self, storage: torch.UntypedStorage, known: set[int]) -> None:
        key = storage._cdata
        if key in known or key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self._bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._bytes -= self._alive.pop(key, 0)
