"""CUDA graphs of a rollout's forwards: one launch in place of a thousand, where launching takes longer than computing."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opdlm.diffusion.proposal import Proposal
from nemo_opdlm.megatron.denoiser import Forward

_logger = logging.getLogger(__name__)

#: Runs a piece of work once, and returns how to do it again on the same memory, and what it returned.
Capture = Callable[[Callable[[], Proposal]], tuple[Callable[[], None], Proposal]]
#: What the work of a forward depends on: the number of keys that it reads, and the shapes of its tensors.
Shape = tuple[int | torch.Size, ...]


@dataclass(frozen=True)
class _Captured:
    """A graph with the memory it reads and writes."""

    inputs: Forward
    replay: Callable[[], None]
    proposal: Proposal


class ForwardGraphs:
    """Answers forwards from graphs, one for each set of shapes; the first forward of each set runs as it is.

    The cache's memory is part of a graph, so graphs live as long as the batch that they were made for. Where a forward cannot
    be captured, all go on without graphs, and the log says why.

    Args:
        answer: runs a forward and proposes; every tensor that it makes depends on shapes alone.
        capture: CUDA's, but for tests.
    """

    def __init__(self, answer: Callable[[Forward], Proposal], capture: Capture | None = None) -> None:
        self._answer = answer
        self._capture = capture or CudaCapture()
        self._graphs: dict[Shape, _Captured] = {}
        self._seen: Counter[Shape] = Counter()
        self._is_given_up = False

    def __call__(self, forward: Forward) -> Proposal:
        """Proposals of a forward; they are overwritten by the next one of the same shapes."""
        key: Shape = (forward.cached.num_keys, *(tensor.shape for tensor in forward.tensors()))
        self._seen[key] += 1
        if self._is_given_up or self._seen[key] == 1:
            return self._answer(forward)
        if key not in self._graphs and not self._add(key, forward):
            return self._answer(forward)
        captured = self._graphs[key]
        for target, source in zip(captured.inputs.tensors(), forward.tensors(), strict=True):
            target.copy_(source)
        captured.replay()
        return captured.proposal

    def _add(self, key: Shape, forward: Forward) -> bool:
        inputs = forward.map(Tensor.clone)
        try:
            replay, proposal = self._capture(lambda: self._answer(inputs))
        except RuntimeError as error:
            _logger.warning("Rollouts go on without CUDA graphs: %s", str(error).splitlines()[0])
            self._is_given_up = True
            self._graphs.clear()
            return False
        self._graphs[key] = _Captured(inputs, replay, proposal)
        return True


class CudaCapture:
    """Captures into one pool of memory: graphs run one after the other, and may share what lies between in- and output."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Proposal]) -> tuple[Callable[[], None], Proposal]:
        """Capture; nothing is computed yet."""
        graph = torch.cuda.CUDAGraph()
        # A checkpoint that another thread is writing may use CUDA all the while.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            proposal = run()
        return graph.replay, proposal
