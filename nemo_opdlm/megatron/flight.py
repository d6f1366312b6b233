"""Decoding with several batches in flight, so that the stages of a pipeline do not wait for each other.

Every stage runs the same sampler on the same batches. It sends hidden states to the stage behind it and goes on to the next
batch; the last stage turns them into proposals, the only thing that all stages are told. With as many batches in flight as there
are stages, the proposals of a batch have arrived by the time it is its turn again. One stage alone is the case without messages.
"""

from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_opdlm.diffusion.denoiser import Query
from nemo_opdlm.diffusion.proposal import Proposal
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.megatron.denoiser import Forward, MegatronDenoiser
from nemo_opdlm.megatron.graphs import ForwardGraphs
from nemo_opdlm.megatron.parallel import ParallelContext
from nemo_opdlm.megatron.student import StagedGPT

#: Rounds of forwards between two questions whether to go on: each is a wait for the device and for the other ranks.
_ROUNDS_PER_QUESTION = 8


class RolloutGivenUp(Exception):
    """A rollout was left unfinished on request; the same prompts, weights and seed give the same rollout again."""


@dataclass
class Flight:
    """A batch that is being decoded.

    Attributes:
        steps: its sampler, which asks for forwards and is sent their proposals.
        denoiser: network and cache that answer it.
        forward: the forward that is under way.
        proposal: its answer, on the last stage.
        graphs: answers its forwards, on one stage alone; None: they are run.
        trajectory: the record, once it has landed.
        under_way: messages of this stage that may not have left yet, with the tensors they carry.
    """

    steps: Generator[Query, Proposal | None, Trajectory]
    denoiser: MegatronDenoiser
    forward: Forward | None = None
    proposal: Proposal | None = None
    graphs: ForwardGraphs | None = None
    trajectory: Trajectory | None = None
    under_way: list[tuple[dist.Work | None, Tensor]] = field(default_factory=list)


def fly(
    model: StagedGPT, starts: Sequence[Callable[[], Flight]], gives_up: Callable[[], bool] | None = None
) -> list[Trajectory]:
    """Decode batches, as many at a time as the pipeline has stages; every stage calls this with the same batches.

    Args:
        model: this rank's part of the network, in evaluation mode.
        starts: makes each batch when it is its turn; a cache lives only as long as its batch is in flight.
        gives_up: whether this rank wants to leave it; asked now and then, and one rank of the row is enough.

    Raises:
        RolloutGivenUp: on all ranks of the row, which have no messages under way then.
    """
    pipeline, waiting = _Pipeline(model), deque(enumerate(starts))
    in_flight: dict[int, Flight] = {}
    landed: dict[int, Trajectory] = {}
    for number_of_round in count():
        if not (waiting or in_flight):
            break
        is_asked = number_of_round % _ROUNDS_PER_QUESTION == 0
        if gives_up is not None and is_asked and model.parallel.any_in_row(gives_up()):
            for flight in in_flight.values():
                pipeline.settle(flight)
            raise RolloutGivenUp
        while waiting and len(in_flight) < model.parallel.pp_size:
            number, start = waiting.popleft()
            in_flight[number] = start()
        for number, flight in list(in_flight.items()):
            pipeline.advance(flight)
            if flight.trajectory is not None:
                landed[number] = flight.trajectory
                del in_flight[number]
            else:
                pipeline.run_chunk(flight, 0)
        for chunk in range(1, len(model)):
            for flight in in_flight.values():
                pipeline.run_chunk(flight, chunk)
    return [landed[number] for number in range(len(starts))]


class _Pipeline:
    """The stages as one of them sees them."""

    def __init__(self, model: StagedGPT) -> None:
        self.model = model
        self.parallel: ParallelContext = model.parallel

    def advance(self, flight: Flight) -> None:
        """Tell the sampler the proposals of the last forward and take its next query."""
        answer = self.settle(flight)
        try:
            query = next(flight.steps) if flight.forward is None else flight.steps.send(answer)
        except StopIteration as end:
            flight.trajectory = end.value
            return
        flight.forward, flight.proposal = flight.denoiser.prepare(query), None

    def settle(self, flight: Flight) -> Proposal | None:
        """Wait for the messages of a batch; returns the proposals of its last forward."""
        answer = self._proposal(flight)
        for work, _ in flight.under_way:
            if work is not None:
                work.wait()
        flight.under_way.clear()
        return answer

    def run_chunk(self, flight: Flight, number: int) -> None:
        """Run a batch's forward through one chunk of this rank; the pipeline's last one makes the proposals."""
        forward, attention = flight.forward, self.model.attention
        assert forward is not None
        if flight.graphs is not None and forward.uniform is not None:
            with attention.use_cache(flight.denoiser.cache):
                flight.proposal = flight.graphs(forward)
            return
        is_first = self.parallel.is_first_stage and number == 0
        is_last = self.parallel.is_last_stage and number == len(self.model) - 1
        hidden = None if is_first else self._receive(forward)
        with attention.use_cache(flight.denoiser.cache):
            hidden = flight.denoiser.run_chunk(number, forward, hidden)
        if not is_last:
            self._send(flight, hidden)
        elif forward.uniform is not None:
            flight.proposal = flight.denoiser.read(forward, hidden[0])
            self._tell(flight, flight.proposal)

    # -- messages --

    def _receive(self, forward: Forward) -> Tensor:
        config = self.model.config
        length = forward.token_ids.numel() // (self.parallel.tp_size if config.sequence_parallel else 1)
        hidden = torch.empty(length, 1, config.hidden_size, dtype=config.pipeline_dtype, device=self.parallel.device)
        rank = self.parallel.pp_rank
        dist.recv(hidden, self.parallel.stage_rank(rank - 1), group=self.parallel.edge(into=rank))
        return hidden

    def _send(self, flight: Flight, hidden: Tensor) -> None:
        rank, hidden = self.parallel.pp_rank + 1, hidden.contiguous()
        work = dist.isend(hidden, self.parallel.stage_rank(rank), group=self.parallel.edge(into=rank))
        flight.under_way.append((work, hidden))

    def _tell(self, flight: Flight, proposal: Proposal) -> None:
        """Send the proposals to all stages without waiting for them."""
        if self.parallel.pp_size > 1:
            # float64 holds token ids and both float32 values exactly: one message instead of three.
            packed = torch.stack([x.double() for x in (proposal.token_ids, proposal.confidence, proposal.entropy)])
            source = self.parallel.stage_rank(self.parallel.pp_rank)
            work = dist.broadcast(packed, source, group=self.parallel.groups.pp, async_op=True)
            flight.under_way.append((work, packed))

    def _proposal(self, flight: Flight) -> Proposal | None:
        """The proposals of the forward under way; None after a prefill."""
        forward = flight.forward
        if forward is None or forward.uniform is None or flight.proposal is not None:
            return flight.proposal
        packed = torch.empty(3, *forward.uniform.shape, dtype=torch.float64, device=self.parallel.device)
        self.parallel.from_last_stage(packed)
        return Proposal(packed[0].long(), packed[1].float(), packed[2].float())
