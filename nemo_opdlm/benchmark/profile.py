"""Where our rollout's time goes."""

from collections import defaultdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

#: Parts of the names of operators, and of CUDA kernels, that do the network's arithmetic; what else runs is overhead.
_ARITHMETIC = ("mm", "linear", "attention", "scaled_dot_product", "fmha", "flash", "gemv", "splitk", "nvjet", "cutlass")


def time_shares(run: Any) -> tuple[float, dict[str, float]]:
    """Share of the time outside the network's matmuls and attention, and the largest parts of it.

    The profiler's own cost falls on small operators: on a CPU the true share is a little smaller. On a GPU it is the share of
    the time in which kernels run.

    Args:
        run: called once.
    """
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        run()
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        spent[event.key] += event.self_device_time_total if on_gpu else event.self_cpu_time_total
    total = sum(spent.values())
    rest = {name: time / total for name, time in spent.items() if not _is_arithmetic(name)}
    largest = sorted(rest, key=lambda name: -rest[name])[:8]
    return sum(rest.values()), {name: rest[name] for name in largest}


def _is_arithmetic(name: str) -> bool:
    return any(part in name.lower() for part in _ARITHMETIC)
