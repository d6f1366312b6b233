"""What a GPU and a CPU both do with one small random model: roll out, and train on rollouts. As a script, the CPU's part."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_opdlm.diffusion.proposal import Proposal, SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.sampler import rollout
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.diffusion.state_selection import StateSelection, select_states
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.distillation.divergence import DivergenceSpec
from nemo_opdlm.distillation.loss import Normalization
from nemo_opdlm.megatron.attention import KVCache
from nemo_opdlm.megatron.denoiser import Forward, MegatronDenoiser
from nemo_opdlm.megatron.forward import forward_backward
from nemo_opdlm.megatron.network import Network
from nemo_opdlm.megatron.optimizer import StudentOptimizer, wrap
from nemo_opdlm.megatron.parallel import ParallelContext, initialize
from nemo_opdlm.megatron.rollout import RolloutEngine
from nemo_opdlm.megatron.step import distillation_loss, micro_batches, total
from nemo_opdlm.megatron.student import ModelOptions, StagedGPT
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.testing import tiny

SEED = 3
NUM_ROWS = 16
#: Tiny random networks are unsure of everything: a low threshold reveals several positions at a time.
THRESHOLD = 0.06
BLOCK_SIZES = (4, 8)
TEMPERATURES = (0.0, 1.0)
#: Rollout batches of a training run, two updates each.
ROLLOUT_STEPS = (1, 2)

#: (row, forward of the row) -> positions ``[M]``, uniform numbers ``[M]`` and logits ``[M, V]`` at its masks, on the CPU
Seen = dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]]


def settings(block_size: int, step: int = 1) -> RolloutSettings:
    """Two or more tokens at a time, end tokens that random networks do hit."""
    return RolloutSettings(
        block_size=block_size,
        denoising_steps=block_size,
        remasking=RemaskingParams(RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC, THRESHOLD),
        mask_token_id=tiny.MASK_TOKEN_ID,
        end_token_ids=tuple(range(36, 38)),
        seed=SEED,
        step=step,
    )


def requests(step: int, device: torch.device) -> Requests:
    """Prompts of every remainder, length limits of every kind."""
    generator = torch.Generator().manual_seed(step)
    prompt_ids = torch.randint(4, 30, (NUM_ROWS, NUM_ROWS), generator=generator)
    limits = torch.randint(1, 33, (NUM_ROWS,), generator=generator)
    rows = torch.arange(NUM_ROWS)
    return Requests(prompt_ids, 1 + rows, limits, rows + step * NUM_ROWS).to(device)


def forbidden_tokens() -> Tensor:
    """Rows of the vocabulary that stand for no token."""
    return torch.arange(tiny.VOCAB_SIZE) >= tiny.NUM_TOKENS


class RecordingDenoiser(MegatronDenoiser):
    """Keeps what every forward saw of every row."""

    def __init__(self, model: StagedGPT, block_size: int, temperature: float) -> None:
        length = -(-(NUM_ROWS + 32) // block_size) * block_size
        forbidden = forbidden_tokens().to(model.parallel.device)
        sampling = SamplingParams(temperature)
        super().__init__(model, KVCache(NUM_ROWS, length), block_size, tiny.MASK_TOKEN_ID, sampling, forbidden)
        self.seen: Seen = {}
        self._forwards = [0] * NUM_ROWS

    def read(self, forward: Forward, hidden: Tensor) -> Proposal:
        assert forward.uniform is not None
        rows = forward.cached.slots[forward.cached.token_row[forward.asked]].cpu()
        columns = (
            forward.attributes.position_ids[0, forward.asked].cpu(),
            forward.uniform[forward.is_asked].cpu(),
            self.logits(hidden).cpu(),
        )
        for row in rows.unique().tolist():
            self._forwards[row] += 1
            self.seen[row, self._forwards[row]] = tuple(x[rows == row] for x in columns)  # type: ignore[assignment]
        return super().read(forward, hidden)


@torch.no_grad()
def roll_out(network: StagedGPT, block_size: int, temperature: float, step: int = 1) -> tuple[Trajectory, Seen]:
    """Decode with the cache; the record and what it rests on."""
    network.eval()
    denoiser = RecordingDenoiser(network, block_size, temperature)
    with network.attention.use_cache(denoiser.cache):
        trajectory = rollout(denoiser, requests(step, network.parallel.device), settings(block_size, step))
    network.train()
    return trajectory, denoiser.seen


def respond(network: StagedGPT, *, runs_ahead: bool, cuda_graphs: bool = False, new_tokens: int = 32) -> Trajectory:
    """The rollout engine's answers to prompts of one length, none of which ends before ``new_tokens``."""
    device = network.parallel.device
    engine = RolloutEngine(
        network,
        SamplingParams(),
        forbidden_tokens().to(device),
        NUM_ROWS,
        runs_ahead=runs_ahead,
        cuda_graphs=cuda_graphs,
    )
    lengths, limits = (torch.full((NUM_ROWS,), length, device=device) for length in (4, new_tokens))
    equal = replace(requests(1, device), prompt_len=lengths, max_new_tokens=limits)
    return engine.generate(equal, replace(settings(4), end_token_ids=()))


def student(parallel: ParallelContext, dtype: torch.dtype = torch.float32) -> StagedGPT:
    """Random weights, the same on every device."""
    return tiny.random_network(tiny.architecture(), parallel, options=ModelOptions(params_dtype=dtype))


def train(
    parallel: ParallelContext,
    dtype: torch.dtype = torch.float32,
    distributed: bool = False,
    replayed: Sequence[Trajectory] = (),
) -> tuple[Network, list[dict[str, float]], list[Trajectory]]:
    """Roll out or replay, select states, ask the teacher, and make two updates of each rollout batch.

    Returns:
        The student, loss and gradient norm of each update, and the rollouts.
    """
    adam = tiny.optimizer_settings(lr=1e-3, min_lr=1e-4, distributed=distributed)
    network = wrap(student(parallel, dtype), adam)
    optimizer = StudentOptimizer(network, adam)
    torch.manual_seed(SEED)
    teacher = Teacher(tiny.architecture(), parallel, ModelOptions(params_dtype=dtype), micro_batch_size=4)
    spec = DivergenceSpec()
    loss = distillation_loss(network.head, spec)
    updates, rollouts = [], []
    for step in ROLLOUT_STEPS:
        trajectory = replayed[step - 1] if replayed else roll_out(network.model, 4, 1.0, step)[0]
        states = select_states(StateSelection.ONE_STATE_PER_BLOCK, trajectory, tiny.MASK_TOKEN_ID, seed=SEED, step=step)
        targets = teacher.targets(trajectory, spec)
        for rows in torch.arange(NUM_ROWS, device=parallel.device).chunk(2):
            parts = micro_batches(trajectory, states, targets, rows, Normalization.sequence, 4)
            optimizer.zero_grad()
            sums = total(forward_backward(network, parts, loss), parallel)
            grad_norm = optimizer.step()
            updates.append({"loss": sums["loss_sum"] / sums["count"], "grad_norm": grad_norm})
        rollouts.append(trajectory)
    return network, updates, rollouts


def record() -> dict[str, Any]:
    """Rollouts of the untrained student, and a training run, as plain values."""
    parallel = initialize()
    network = student(parallel)
    found: dict[str, Any] = {"weights": [parameter.detach().clone() for parameter in network.parameters()]}
    for block_size in BLOCK_SIZES:
        for temperature in TEMPERATURES:
            trajectory, seen = roll_out(network, block_size, temperature)
            found[f"rollout {block_size} {temperature}"] = (trajectory.state_dict(), seen)
    _, found["updates"], rollouts = train(parallel)
    found["rollouts"] = [trajectory.state_dict() for trajectory in rollouts]
    return found


if __name__ == "__main__":
    torch.save(record(), Path(sys.argv[1]))
