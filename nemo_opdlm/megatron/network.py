"""The student as the trainer holds it: the network, its head, its data-parallel wrapper and its place in the layout."""

from dataclasses import dataclass

from megatron.core.distributed import DistributedDataParallel

from nemo_opdlm.megatron.head import LMHead
from nemo_opdlm.megatron.parallel import ParallelContext
from nemo_opdlm.megatron.student import HiddenStatesGPT


@dataclass(frozen=True)
class Network:
    """One network of a run.

    Attributes:
        model: the network itself; rollouts read it in place.
        ddp: the same network inside Megatron's DistributedDataParallel, which owns its gradient buffers.
        head: its LM head.
        parallel: this process's place in the layout.
    """

    model: HiddenStatesGPT
    ddp: DistributedDataParallel
    head: LMHead
    parallel: ParallelContext
