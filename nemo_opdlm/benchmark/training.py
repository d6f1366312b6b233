"""The training benchmark: both arms in turn, repeat by repeat, and what ours saves."""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nemo_opdlm.benchmark.floor import Machine
from nemo_opdlm.benchmark.timing import LEAST_MODEL_SHARE, wait
from nemo_opdlm.benchmark.training_arms import Arms
from nemo_opdlm.benchmark.training_cost import FEW_LAYERS, HeadLoss, flops, needed_flops, peak_bytes
from nemo_opdlm.benchmark.training_workload import TrainingBatch, mixed_lengths, prompt_lengths
from nemo_opdlm.benchmark.workload import Subject

#: Largest relative difference of the two arms' losses, in fp32.
LOSS_TOLERANCE = 1e-4
#: Vocabularies between which the head's memory is to stay the same, and the tokens it is measured with.
VOCABULARIES, HEAD_TOKENS = (2**15, 2**18), 256


@dataclass(frozen=True)
class Plan:
    """Sizes of a benchmark.

    Attributes:
        num_rows: rollouts of an update.
        prompt_len: tokens of the longest prompt.
        mean_tokens, cap: mean and longest response.
        block_size: b.
        memory_tokens: tokens of the row that memory is compared with.
        pack_to_tokens: of our micro-batches.
        repeats: runs of each arm.
    """

    num_rows: int = 6
    prompt_len: int = 48
    mean_tokens: int = 140
    cap: int = 512
    block_size: int = 4
    memory_tokens: int = 4096
    pack_to_tokens: int = 2048
    repeats: int = 2


@dataclass
class Runs:
    """The runs of an arm: seconds and losses, and of ours the machine's FLOP/s beside each."""

    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    model_shares: list[float] = field(default_factory=list)
    machine_flops: list[float] = field(default_factory=list)


def compare(subject: Subject, plan: Plan, on_run: Callable[[str], None]) -> dict[str, Any]:
    """Run both arms; see `examples/benchmark.py` for the figures.

    Args:
        subject: the model, in fp32.
        plan: sizes.
        on_run: told what is run next.

    Raises:
        ValueError: sizes that contradict each other.
        RuntimeError: the arms' losses differ: their times compare different work.
    """
    responses = mixed_lengths(plan.num_rows, plan.mean_tokens, plan.cap)
    batch = make_batch(subject, prompt_lengths(plan.num_rows, plan.prompt_len), responses, plan.block_size)
    on_run("counting FLOPs, two and three layers")
    spent = flops(subject, batch, plan.pack_to_tokens)
    on_run("counting the head's memory by vocabulary")
    arch = subject.generator.network.arch
    small, large = (HeadLoss.of(arch, vocab_size, HEAD_TOKENS).peak_bytes() for vocab_size in VOCABULARIES)
    arms, long, peaks = Arms.of(subject, plan.pack_to_tokens), one_row(subject, plan.memory_tokens, plan), {}
    for name, arm in (("ours", arms.ours), ("reference", arms.reference)):
        on_run(f"memory at {plan.memory_tokens} tokens: {name}")
        peaks[name] = peak_bytes(lambda a=arm: a.gradients(long))  # type: ignore[misc]
    ours, reference = _run(subject, arms, batch, plan, on_run)
    ratios = sorted(r / o for r, o in zip(reference.seconds, ours.seconds, strict=True))
    needed = needed_flops(arch, batch)
    per_second = [spent["ours"] / seconds for seconds in ours.seconds]
    efficiency = [mine / best for mine, best in zip(per_second, ours.machine_flops, strict=True)]
    model_share = statistics.median(reference.model_shares)
    return {
        "speedup_per_useful_token": statistics.median(ratios),
        "speedups": ratios,
        "peak_memory_ratio": peaks["reference"] / peaks["ours"],
        "peak_memory_256k_over_32k_vocab": large / small,
        "matmul_efficiency": statistics.median(efficiency),
        "plan": asdict(plan),
        "threads": torch.get_num_threads(),
        "vocab_size": arch.vocab_size,
        "num_layers": arch.num_layers,
        "counted_layers": FEW_LAYERS,
        "num_useful_tokens": batch.num_useful,
        "num_supervised_tokens": batch.num_supervised,
        "loss": {"ours": ours.losses[-1], "reference": reference.losses[-1]},
        "needed_flops": needed,
        "matmul_flops_per_s": {"ours": statistics.median(per_second), "machine": statistics.median(ours.machine_flops)},
        "head_peak_bytes": {"32k": small, "256k": large},
        "arms": {
            name: {
                "ms_per_useful_token": 1e3 * statistics.median(runs.seconds) / batch.num_useful,
                "seconds": runs.seconds,
                "spent_flops": spent[name],
                "spent_over_needed": spent[name] / needed,
                "peak_mib": peaks[name] / 2**20,
                "model_share": model_share if name == "reference" else None,
                "is_void": name == "reference" and model_share < LEAST_MODEL_SHARE,
            }
            for name, runs in (("ours", ours), ("reference", reference))
        },
    }


def make_batch(
    subject: Subject, prompts: torch.Tensor, responses: torch.Tensor, block_size: int, num_states: int = 1
) -> TrainingBatch:
    """Rollouts of these lengths in the subject's vocabulary, on its device."""
    mask_token_id, vocab_size = subject.generator.tokens.mask_token_id, subject.generator.network.arch.vocab_size
    batch = TrainingBatch.of_lengths(prompts, responses, vocab_size, mask_token_id, block_size, num_states)
    return batch.to(subject.device)


def one_row(subject: Subject, num_tokens: int, plan: Plan, num_states: int = 1) -> TrainingBatch:
    """A rollout whose row has so many tokens, or a few less."""
    prompt_len = min(plan.prompt_len, num_tokens // 4) // plan.block_size * plan.block_size
    response_len = (num_tokens - prompt_len) // (1 + num_states) // plan.block_size * plan.block_size
    return make_batch(subject, torch.tensor([prompt_len]), torch.tensor([response_len]), plan.block_size, num_states)


def _run(
    subject: Subject, arms: Arms, batch: TrainingBatch, plan: Plan, on_run: Callable[[str], None]
) -> tuple[Runs, Runs]:
    ours, reference = Runs(), Runs()
    on_run("warm-up")
    short = make_batch(subject, torch.tensor([4]), torch.tensor([8]), plan.block_size)
    arms.ours.run(short)
    arms.reference.run(short)
    for repeat in range(plan.repeats):
        on_run(f"repeat {repeat + 1} of {plan.repeats}: ours")
        before = Machine.measure(subject.device, torch.float32).flops
        _timed(lambda: arms.ours.run(batch), subject.device, ours)
        ours.machine_flops.append(max(before, Machine.measure(subject.device, torch.float32).flops))
        on_run(f"repeat {repeat + 1} of {plan.repeats}: reference")
        arms.reference.model_seconds = 0.0
        _timed(lambda: arms.reference.run(batch), subject.device, reference)
        reference.model_shares.append(arms.reference.model_seconds / reference.seconds[-1])
    for mine, theirs in zip(ours.losses, reference.losses, strict=True):
        if abs(mine - theirs) > LOSS_TOLERANCE * abs(theirs):
            raise RuntimeError(f"the loss is {mine} in our update and {theirs} in the published one")
    return ours, reference


def _timed(run: Callable[[], float], device: torch.device, runs: Runs) -> None:
    wait(device)
    start = time.perf_counter()
    loss = run()
    wait(device)
    runs.seconds.append(time.perf_counter() - start)
    runs.losses.append(loss)
