"""The student as the trainer holds it: the network, its head, its data-parallel wrappers and its place in the layout."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel

from nemo_opdlm.megatron.head import LMHead
from nemo_opdlm.megatron.parallel import ParallelContext
from nemo_opdlm.megatron.student import StagedGPT


@dataclass(frozen=True)
class Network:
    """One network of a run.

    Attributes:
        model: the network itself; rollouts read it in place.
        ddp: its chunks inside Megatron's DistributedDataParallel, which owns their gradient buffers.
        head: its LM head, on the last pipeline stage.
    """

    model: StagedGPT
    ddp: Sequence[DistributedDataParallel]
    head: LMHead

    @property
    def parallel(self) -> ParallelContext:
        """This process's place in the layout."""
        return self.model.parallel

    def zero_grad_buffer(self) -> None:
        """Clear the gradient buffers of all chunks."""
        for chunk in self.ddp:
            chunk.zero_grad_buffer()

    def finish_param_sync(self) -> None:
        """Have the newest weights on every rank before one of them reads them outside an update; every rank calls this."""
        for chunk in self.ddp:
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
