"""Rollouts on a GPU are those of a CPU, token for token, but where two candidates lie within rounding of each other."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.megatron.parallel import ParallelContext
from nemo_opdlm.rng import Stream, uniform
from tests.gpu import both_devices

#: Of logits, and of probabilities that decide between two candidates.
ROUNDING = 1e-4


def probabilities(logits: Tensor) -> Tensor:
    """What the sampler draws from, fp64 ``[M, V]``."""
    return logits.double().masked_fill(both_devices.forbidden_tokens(), -torch.inf).softmax(-1)


def is_toss_up(uniforms: Tensor, logits: Tensor, temperature: float) -> bool:
    """Whether rounding decides about a token of this forward, or about which of them are revealed."""
    p = probabilities(logits)
    if temperature == 0:
        best = p.topk(2).values
        margins = [best[:, 0] - best[:, 1]]
        chosen = best[:, 0]
    else:
        cumulated = p.cumsum(-1)
        margins = [(cumulated - uniforms[:, None]).abs().flatten()]
        chosen = p.gather(1, (cumulated > uniforms[:, None]).to(torch.uint8).argmax(-1, keepdim=True))[:, 0]
    margins += [(chosen - both_devices.THRESHOLD).abs(), chosen.sort().values.diff()]
    return bool((torch.cat(margins) < ROUNDING).any())


def test_random_numbers_are_those_of_the_cpu_bit_for_bit() -> None:
    samples, positions = torch.arange(1000)[:, None] * 7919, torch.arange(64)
    on_cpu = uniform(2**40 + 1, Stream.PROPOSAL, 5, samples, positions, 3)
    on_gpu = uniform(2**40 + 1, Stream.PROPOSAL, 5, samples.cuda(), positions.cuda(), 3)
    assert torch.equal(on_gpu.cpu(), on_cpu)


@pytest.mark.parametrize("temperature", both_devices.TEMPERATURES)
@pytest.mark.parametrize("block_size", both_devices.BLOCK_SIZES)
def test_rollouts_are_those_of_the_cpu_token_for_token(
    block_size: int, temperature: float, parallel: ParallelContext, on_cpu: dict[str, Any]
) -> None:
    state, seen_on_cpu = on_cpu[f"rollout {block_size} {temperature}"]
    expected = Trajectory.from_state_dict(state)
    found, seen = both_devices.roll_out(both_devices.student(parallel), block_size, temperature)
    found = found.to("cpu")
    width = min(found.token_ids.shape[1], expected.token_ids.shape[1])
    records = [torch.stack([x.token_ids[:, :width], x.unmask_step[:, :width].long()]) for x in (found, expected)]
    differs = (records[0] != records[1]).any(0)
    for row in range(len(expected)):
        # Until the first difference both devices saw the same context, hence nearly the same logits.
        steps = torch.stack([x.unmask_step[row, :width][differs[row]] for x in (found, expected)]).flatten()
        same_until = int(steps.min()) if steps.numel() else int(expected.num_forwards[row])
        for forward in range(1, same_until + 1):
            (_, ours, our_logits), (_, theirs, logits) = seen[row, forward], seen_on_cpu[row, forward]
            assert torch.equal(ours, theirs)
            torch.testing.assert_close(our_logits, logits, atol=ROUNDING, rtol=0)
        if steps.numel():
            _, uniforms, logits = seen_on_cpu[row, same_until]
            assert is_toss_up(uniforms, logits, temperature), (row, same_until)


def test_the_same_rollout_twice_is_the_same() -> None:
    network = both_devices.student(both_devices.initialize())
    (first, _), (second, _) = (both_devices.roll_out(network, 4, 1.0) for _ in range(2))
    assert all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(second.state_dict()[key]))
        for key, x in first.state_dict().items()
    )


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_running_ahead_and_graphs_change_nothing(parallel: ParallelContext, cuda_graphs: bool) -> None:
    network = both_devices.student(parallel)
    expected = both_devices.respond(network, runs_ahead=False)
    found = both_devices.respond(network, runs_ahead=True, cuda_graphs=cuda_graphs)
    for name in ("token_ids", "unmask_step", "response_len", "num_forwards"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_no_forward_waits_for_the_gpu(parallel: ParallelContext) -> None:
    """A batch waits when it begins and ends, as often for long responses as for short ones."""
    network, num_waits = both_devices.student(parallel), []
    both_devices.respond(network, runs_ahead=True)
    for new_tokens in (8, 64):
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            both_devices.respond(network, runs_ahead=True, new_tokens=new_tokens)
            torch.cuda.set_sync_debug_mode("default")
        num_waits.append(sum("synchroniz" in str(wait.message) for wait in waits))
    assert num_waits[0] == num_waits[1]
