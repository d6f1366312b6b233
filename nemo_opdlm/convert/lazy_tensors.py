"""A state dict whose tensors are read when they are asked for: a large model is never in memory as a whole."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name; each access reads anew. It can be pickled if `read` can.

    Args:
        names: of the tensors, in order.
        read: name -> tensor.
    """

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        self._names = dict.fromkeys(names)
        self._read = read

    def __getitem__(self, name: str) -> Tensor:
        if name not in self:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
