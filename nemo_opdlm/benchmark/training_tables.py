"""The figures of the training benchmark for the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

_NAMES = {"ours": "ours", "reference": "published recipe, HF"}
_CAPTION = (
    "ms: time of a whole update per useful token (prompts, responses and states, each once), median. spent/needed: FLOPs over "
    "those of an update that computes nothing twice or in vain. MiB: most memory beside weights, gradients and optimizer "
    "state. network: share of the time inside the network, void below 85 %."
)


def arm_table(figures: Mapping[str, Any]) -> Table:
    """A row per arm."""
    plan = figures["plan"]
    title = (
        f"{plan['num_rows']} rollouts, responses of {plan['mean_tokens']} tokens on average and up to {plan['cap']}, blocks of "
        f"{plan['block_size']}, fp32, {figures['threads']} threads"
    )
    table = Table(title=title, title_justify="left", caption=_CAPTION, caption_justify="left")
    table.add_column("arm", no_wrap=True)
    for name in ("ms", "spent/needed", f"MiB, {plan['memory_tokens']} tokens", "network"):
        table.add_column(name, justify="right")
    for key, arm in figures["arms"].items():
        share = arm["model_share"]
        table.add_row(
            _NAMES[key],
            f"{arm['ms_per_useful_token']:.2f}",
            f"{arm['spent_over_needed']:.2f}",
            f"{arm['peak_mib']:.0f}",
            "" if share is None else f"{share:.0%}" + (" (void)" if arm["is_void"] else ""),
            style="bold" if key == "ours" else "",
        )
    return table


def sweep_table(points: Sequence[Mapping[str, Any]]) -> Table:
    """Cost by size."""
    title = f"sweep, {points[0]['num_layers']} layers: ours, and the published recipe over ours"
    table = Table(title=title, title_justify="left")
    table.add_column("of", no_wrap=True)
    for name in ("size", "ms", "time ratio", "MiB", "memory ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in points:
        table.add_row(
            point["of"],
            f"{point['size']:g}",
            f"{point['ms_per_useful_token']:.3f}",
            f"{point['time_ratio']:.2f}" if "time_ratio" in point else "",
            f"{point['peak_mib']:.0f}",
            f"{point['memory_ratio']:.2f}" if "memory_ratio" in point else "",
        )
    return table


def remarks(figures: Mapping[str, Any]) -> Iterator[str]:
    """What is left to say, a line each."""
    runs, loss, speed = figures["speedups"], figures["loss"], figures["matmul_flops_per_s"]
    yield (
        f"time per useful token: {figures['speedup_per_useful_token']:.2f} times less ({runs[0]:.2f} to {runs[-1]:.2f}), "
        f"{figures['num_useful_tokens']} useful tokens, {figures['num_supervised_tokens']} of them masked"
    )
    yield (
        f"memory at {figures['plan']['memory_tokens']} tokens and {figures['vocab_size']} rows of vocabulary: "
        f"{figures['peak_memory_ratio']:.2f} times less"
    )
    yield f"head's memory, 256k over 32k rows of vocabulary: {figures['peak_memory_256k_over_32k_vocab']:.3f}"
    yield (
        f"matmuls of our update: {speed['ours'] / 1e9:.0f} GFLOP/s, {figures['matmul_efficiency']:.0%} of the "
        f"{speed['machine'] / 1e9:.0f} of a large torch.mm beside it"
    )
    yield f"loss, same weights and rollouts: {loss['ours']:.7f} (ours), {loss['reference']:.7f} (published recipe)"
