"""Rollout: block by block, and inside a block denoising step by denoising step."""

from collections.abc import Callable, Generator
from functools import partial

from nemo_opdlm.diffusion.canvas import Canvas
from nemo_opdlm.diffusion.denoiser import Denoiser, Query
from nemo_opdlm.diffusion.proposal import Proposal
from nemo_opdlm.diffusion.remasking import positions_to_reveal
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.settings import RolloutProgress, RolloutSettings
from nemo_opdlm.diffusion.trajectory import NEVER_UNMASKED, Trajectory
from nemo_opdlm.rng import Stream


def rollout(
    denoiser: Denoiser,
    requests: Requests,
    settings: RolloutSettings,
    on_progress: Callable[[RolloutProgress], None] | None = None,
    num_slots: int | None = None,
    late_reads: bool = False,
) -> Trajectory:
    """Answer prompts with one network that answers at once; see `decode` for the arguments."""
    return run(denoiser, decode(requests, settings, on_progress, num_slots, late_reads))


def run(denoiser: Denoiser, steps: Generator[Query, Proposal | None, Trajectory]) -> Trajectory:
    """Let a network answer the queries of a sampler, one after the other."""
    answer: Proposal | None = None
    while True:
        try:
            query = steps.send(answer)
        except StopIteration as end:
            trajectory: Trajectory = end.value
            return trajectory
        if query.uniform is None:
            denoiser.prefill(query)
            answer = None
        else:
            answer = denoiser.propose(query)


def decode(
    requests: Requests,
    settings: RolloutSettings,
    on_progress: Callable[[RolloutProgress], None] | None = None,
    num_slots: int | None = None,
    late_reads: bool = False,
) -> Generator[Query, Proposal | None, Trajectory]:
    """Answer prompts. A row's answer does not depend on the rows beside it, nor on their order or slot.

    A row that is finished hands its slot to the next prompt, so that the batch stays full until prompts run out. Rows go
    through their blocks independently; every forward denoises one block of each row that has a slot, and the first forward
    of a block also commits the block before it, so no forward is spent on the cache alone (but for prompts longer than a
    block) and none follows a row's last block. The device is read once per forward.

    Written as a coroutine, so that a pipeline can keep the queries of several batches in flight: it yields what it asks
    of the network and is sent the proposals (None after a prefill).

    Args:
        requests: the prompts.
        settings: how to decode.
        on_progress: called before each forward and once at the end.
        num_slots: rows that are decoded at a time, those of the cache; None for all of them.
        late_reads: use what is read from the device one forward later, so that the host need not wait for the forward
            that it has just asked for. The answers are the same. A finished row keeps its slot for one forward more, which
            leaves no trace, and the shapes of queries are few: every row brings two blocks, slots are halved at the end.
    """
    canvas = Canvas(requests, settings, on_progress, num_slots, late_reads)
    while (blocks := canvas.open_blocks()) is not None:
        prefill = canvas.prefill(blocks)
        if prefill is not None:
            yield prefill
        masked = canvas.unmask_step[blocks.places] == NEVER_UNMASKED
        proposal = yield canvas.query(blocks)
        assert proposal is not None
        reveal = positions_to_reveal(
            settings.remasking,
            proposal,
            masked,
            canvas.quota(blocks),
            partial(canvas.uniform, Stream.REMASKING, blocks),
        )
        canvas.reveal(blocks, reveal, proposal)
        canvas.advance(blocks, is_complete=~(masked & ~reveal).any(-1))
        canvas.tell(blocks)
    return canvas.trajectory()
