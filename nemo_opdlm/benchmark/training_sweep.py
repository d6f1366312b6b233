"""Cost of an update against the size of each thing it can grow with, on the first layers of the model."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from nemo_opdlm.benchmark.timing import wait
from nemo_opdlm.benchmark.training import HEAD_TOKENS, Plan, make_batch, one_row
from nemo_opdlm.benchmark.training_arms import Arms
from nemo_opdlm.benchmark.training_cost import FEW_LAYERS, HeadLoss, peak_bytes
from nemo_opdlm.benchmark.training_workload import TrainingBatch
from nemo_opdlm.benchmark.workload import Subject

LENGTHS = (512, 1024, 2048, 4096, 8192)
MASKED_SHARES = (0.1, 0.25, 0.5, 1.0)
VOCABULARIES = (2**15, 2**16, 2**17, 2**18)
NUM_STATES = (1, 2, 4, 8)


def sweep(subject: Subject, plan: Plan, on_run: Callable[[str], None]) -> list[dict[str, Any]]:
    """Both arms by sequence length, masked share and states per rollout; our head alone by vocabulary."""
    arms, points = Arms.of(subject, plan.pack_to_tokens, FEW_LAYERS[0]), []
    for name, size, batch in _batches(subject, plan):
        on_run(f"sweep: {name} {size:g}")
        points.append({"of": name, "size": size, **_both(arms, batch, subject.device)})
    for vocab_size in VOCABULARIES:
        on_run(f"sweep: vocabulary {vocab_size}")
        points.append({"of": "vocabulary, head", "size": vocab_size, **_head(subject, vocab_size)})
    return [point | {"num_layers": FEW_LAYERS[0]} for point in points]


def _batches(subject: Subject, plan: Plan) -> Iterator[tuple[str, float, TrainingBatch]]:
    for length in LENGTHS:
        yield "row tokens", length, one_row(subject, length, plan)
    mask_token_id = subject.generator.tokens.mask_token_id
    for share in MASKED_SHARES:
        yield "masked share", share, one_row(subject, 2048, plan).masked(share, mask_token_id)
    for num_states in NUM_STATES:
        lengths = torch.tensor([plan.prompt_len]), torch.tensor([2 * plan.mean_tokens])
        yield "states", num_states, make_batch(subject, *lengths, plan.block_size, num_states)


def _both(arms: Arms, batch: TrainingBatch, device: torch.device) -> dict[str, float]:
    """Time of an update, then memory of one; published rows have one state each."""
    seconds, peaks = [], []
    for run in (arms.ours.gradients, arms.reference.gradients):
        seconds.append(_seconds(lambda run=run: run(batch), device))  # type: ignore[misc]
        peaks.append(peak_bytes(lambda run=run: run(batch)))  # type: ignore[misc]
    return {
        "ms_per_useful_token": 1e3 * seconds[0] / batch.num_useful,
        "time_ratio": seconds[1] / seconds[0],
        "peak_mib": peaks[0] / 2**20,
        "memory_ratio": peaks[1] / peaks[0],
    }


def _head(subject: Subject, vocab_size: int) -> dict[str, float]:
    head = HeadLoss.of(subject.generator.network.arch, vocab_size, HEAD_TOKENS)
    peak = head.peak_bytes()
    seconds = _seconds(head.run, subject.device)
    return {"ms_per_useful_token": 1e3 * seconds / HEAD_TOKENS, "peak_mib": peak / 2**20}


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start
