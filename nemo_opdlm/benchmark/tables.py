"""The figures of the rollout benchmark for the terminal."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

_CAPTION = (
    "loop: block-diffusion decoding as published, around a Hugging Face model. tok/s: response tokens per second, median. "
    "fwds: calls of the network. pad: share of the token places in them that no unfinished row needs. MiB: most memory "
    "beside the weights. network: share of the time inside the network, void below 85 %."
)
_WORKLOADS = {"equal": "equal", "mix": "mix"}


def arm_table(figures: Mapping[str, Any]) -> Table:
    """A row per arm."""
    plan = figures["plan"]
    title = (
        f"{plan['batch_size']} rows, prompts of {plan['prompt_len']} tokens, responses of {plan['new_tokens']}, blocks of "
        f"{plan['block_size']}, {figures['precision']}, {figures['threads']} threads"
    )
    table = Table(title=title, title_justify="left", caption=_CAPTION, caption_justify="left")
    table.add_column("arm", no_wrap=True)
    table.add_column("lengths", no_wrap=True)
    for name in ("tok/s", "fwds", "pad", "MiB", "network"):
        table.add_column(name, justify="right", no_wrap=True)
    for key, arm in figures["arms"].items():
        workload = _WORKLOADS.get(key.rpartition("_")[2], "2 rows x 32")
        share, peak = arm["model_share"], arm["peak_mib"]
        table.add_row(
            arm["name"],
            workload,
            f"{arm['tokens_per_s']:.1f}",
            str(arm["num_forwards"]),
            f"{arm['padding_share']:.0%}",
            "" if peak is None else f"{peak:.0f}",
            "" if share is None else f"{share:.0%}" + (" (void)" if arm["is_void"] else ""),
            style="bold" if arm["name"] == "ours" else "",
        )
    return table


def ratio_table(figures: Mapping[str, Any]) -> Table:
    """How many times as long a token takes elsewhere."""
    table = Table(title="time per token, divided by ours", title_justify="left")
    table.add_column("")
    for name in ("min", "median", "max"):
        table.add_column(name, justify="right")
    for name, ratio in figures["ratios"].items():
        table.add_row(name, *(f"{ratio[column]:.2f}" for column in ("min", "median", "max")))
    return table


def sweep_table(points: Sequence[Mapping[str, float]]) -> Table:
    """Cost of a token by size."""
    table = Table(title="sweep", title_justify="left")
    for name in ("rows", "new tokens", "ms per token", "(c) / ours"):
        table.add_column(name, justify="right")
    for point in points:
        table.add_row(
            str(point["batch_size"]),
            str(point["new_tokens"]),
            f"{point['ms_per_token']:.2f}",
            f"{point['ratio_vs_hf_batched']:.2f}",
        )
    return table


def remarks(figures: Mapping[str, Any]) -> Iterator[str]:
    """What is left to say, a line each."""
    static, dynamic, floor = figures["static"], figures["dynamic"], figures["floor"]
    yield (
        f"tokens per forward: static {static['revealed']:.3f} revealed, {static['kept']:.3f} kept (published loop "
        f"{static['reference_revealed']:.3f}); dynamic {dynamic['revealed']:.3f} revealed, {dynamic['kept']:.3f} kept, at "
        f"k = {dynamic['forwards_per_block']:.2f} forwards per block, {dynamic['ratio_vs_reference']:.3f} = (k + 1) / k "
        "times the published loop's"
    )
    parts = ", ".join(f"{name.removeprefix('aten::')} {share:.1%}" for name, share in figures["overhead_parts"].items())
    yield f"outside matmuls and attention: {figures['overhead_share']:.1%} of the time ({parts})"
    yield (
        f"floor: {floor['flops'] / 1e9:.2f} GFLOP and {floor['num_bytes'] / 1e6:.1f} MB per token at "
        f"{floor['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s and {floor['copy_bytes_per_s'] / 1e9:.1f} GB/s (measured): "
        f"{floor['seconds_per_token'] * 1e3:.2f} ms, ours {floor['ours_over_floor']:.2f} times"
    )
    equal, mix = figures["identical_tokens_equal"], figures["identical_tokens_mix"]
    yield f"tokens written alike by ours and (c), from the same random numbers: {equal:.1%} (equal), {mix:.1%} (mix)"
