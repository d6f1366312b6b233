"""The rollout benchmark: arms in turn, repeat by repeat, and their ratios to ours."""

import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from nemo_opdlm.benchmark import arms
from nemo_opdlm.benchmark.arms import Outcome
from nemo_opdlm.benchmark.floor import Floor, Machine
from nemo_opdlm.benchmark.profile import time_shares
from nemo_opdlm.benchmark.timing import LEAST_MODEL_SHARE
from nemo_opdlm.benchmark.workload import Subject, Workload
from nemo_opdlm.diffusion.remasking import RemaskingStrategy
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.testing.memory import AllocationProfile


@dataclass(frozen=True)
class Plan:
    """Sizes of a benchmark.

    Attributes:
        batch_size: rows decoded together.
        prompt_len: tokens of a prompt; half to all of it in the mix.
        new_tokens: tokens of a response, the cap of the mix.
        block_size: b, and denoising steps of a block.
        repeats: runs of each arm.
    """

    batch_size: int = 16
    prompt_len: int = 61
    new_tokens: int = 128
    block_size: int = 4
    repeats: int = 2


@dataclass
class Arm:
    """An arm on a workload, and its runs."""

    name: str
    run: Callable[[], Outcome]
    peak_bytes: int = 0
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def seconds_per_token(self) -> float:
        """Median."""
        return statistics.median(outcome.seconds_per_token for outcome in self.outcomes)

    @property
    def model_share(self) -> float | None:
        """Median share of the time inside the network."""
        shares = [outcome.model_share for outcome in self.outcomes if outcome.model_share is not None]
        return statistics.median(shares) if shares else None


def compare(subject: Subject, plan: Plan, on_run: Callable[[str], None]) -> dict[str, Any]:
    """Run all arms; see `examples/benchmark.py` for the figures.

    Args:
        subject: the model.
        plan: sizes.
        on_run: told what is run next.
    """
    vocab_size, settings = subject.forbidden.numel(), subject.settings(plan.block_size)
    equal = Workload.equal(plan.batch_size, plan.prompt_len, plan.new_tokens, vocab_size)
    mix = Workload.mix(2 * plan.batch_size, plan.prompt_len, plan.new_tokens, vocab_size)
    few = equal.first(2, 32)
    size = plan.batch_size
    every = {
        "ours_equal": Arm("ours", lambda: arms.ours(subject, equal, size, settings)),
        "hf_equal": Arm("(c) loop, batched", lambda: arms.reference(subject, equal, size, settings)),
        "ar_equal": Arm("(e) AR, generate()", lambda: arms.autoregressive(subject, equal, size)),
        "ours_mix": Arm("ours", lambda: arms.ours(subject, mix, size, settings)),
        "hf_mix": Arm("(c) loop, batched", lambda: arms.reference(subject, mix, size, settings)),
        "ar_mix": Arm("(e) AR, generate()", lambda: arms.autoregressive(subject, mix, size)),
        "reference": Arm("(b) loop, row by row", lambda: arms.reference(subject, few, 1, settings)),
        "no_cache": Arm(
            "(d) loop, no cache",
            lambda: arms.reference(subject, few, len(few), settings, uses_cache=False),
        ),
    }
    _warm_up(subject, plan, every, equal, mix, on_run)
    for repeat in range(plan.repeats):
        for arm in every.values():
            on_run(f"repeat {repeat + 1} of {plan.repeats}: {arm.name}")
            arm.outcomes.append(arm.run())
    on_run("profile, dynamic decoding")
    return {**_figures(subject, plan, every, equal, few), **_decoding_figures(subject, plan, equal)}


def _warm_up(
    subject: Subject, plan: Plan, every: dict[str, Arm], equal: Workload, mix: Workload, on_run: Callable[[str], None]
) -> None:
    """A short run of each kind, and the memory of each arm with a batch at its full length."""
    settings, size = subject.settings(plan.block_size), plan.batch_size
    short = equal.first(size, 2 * plan.block_size)
    kinds: dict[str, Callable[[Workload], object]] = {
        "ours": lambda work: arms.ours(subject, work, size, settings),
        "hf": lambda work: arms.reference(subject, work, size, settings),
        "ar": lambda work: arms.autoregressive(subject, work, size),
    }
    for kind, run in kinds.items():
        on_run(f"warm-up and memory: {kind}")
        run(short)
        for name, work in (("equal", equal), ("mix", mix)):
            # Its last forwards are the largest: a prompt as long as all but the end of the response shows the same peak.
            with AllocationProfile() as memory:
                run(_near_the_end(work, size, 2 * plan.block_size))
            every[f"{kind}_{name}"].peak_bytes = memory.peak_bytes


def _near_the_end(work: Workload, num_rows: int, new_tokens: int) -> Workload:
    """The first rows with all but their last tokens moved into the prompt."""
    moved = (work.limits[:num_rows] - new_tokens).clamp(min=0)
    lengths = work.prompt_len[:num_rows] + moved
    prompts = work.prompt_ids[:num_rows, torch.arange(int(lengths.max())) % work.prompt_ids.shape[1]]
    return Workload(prompts, lengths, work.limits[:num_rows] - moved)


def _figures(subject: Subject, plan: Plan, every: dict[str, Arm], equal: Workload, few: Workload) -> dict[str, Any]:
    ratios = {
        "ratio_vs_reference": _ratio(every["reference"], every["ours_equal"]),
        "ratio_vs_hf_batched_equal": _ratio(every["hf_equal"], every["ours_equal"]),
        "ratio_vs_hf_batched_mix": _ratio(every["hf_mix"], every["ours_mix"]),
        "ratio_vs_no_cache": _ratio(every["no_cache"], every["ours_equal"]),
        "ratio_vs_generate_equal": _ratio(every["ar_equal"], every["ours_equal"]),
        "ratio_vs_generate_mix": _ratio(every["ar_mix"], every["ours_mix"]),
    }
    network = subject.generator.network
    dtype = next(network.parameters()).dtype
    machine = Machine.measure(subject.device, dtype)
    floor = Floor.of(network.arch, equal, plan.batch_size, plan.block_size, dtype.itemsize)
    return {
        **{name: found["median"] for name, found in ratios.items()},
        "ratios": ratios,
        "plan": asdict(plan),
        "precision": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "arms": {key: _row(arm) for key, arm in every.items()},
        "identical_tokens_equal": _identical(every["ours_equal"], every["hf_equal"]),
        "identical_tokens_mix": _identical(every["ours_mix"], every["hf_mix"]),
        "floor": {
            **asdict(floor),
            "matmul_flops_per_s": machine.flops,
            "copy_bytes_per_s": machine.bandwidth,
            "seconds_per_token": floor.seconds(machine),
            "ours_over_floor": every["ours_equal"].seconds_per_token / floor.seconds(machine),
        },
    }


def _decoding_figures(subject: Subject, plan: Plan, equal: Workload) -> dict[str, Any]:
    """Tokens per forward by strategy, and where the time of a short rollout goes."""
    short, size = equal.first(plan.batch_size, 32), plan.batch_size
    settings = subject.settings(plan.block_size)
    overhead, rest = time_shares(lambda: arms.answer(subject, short, size, settings))
    dynamic = subject.settings(plan.block_size, RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC, threshold=0.3)
    static_, dynamic_ = (tokens_per_forward(arms.answer(subject, short, size, s)) for s in (settings, dynamic))
    return {
        "overhead_share": overhead,
        "overhead_parts": rest,
        "tokens_per_forward_static": static_["revealed"],
        "tokens_per_forward_dynamic": dynamic_["revealed"],
        "static": static_,
        "dynamic": dynamic_,
    }


def tokens_per_forward(trajectory: Trajectory) -> dict[str, float]:
    """Positions revealed and tokens kept per denoising forward, and the same for a loop that commits blocks apart.

    A row's prefill is not counted. ``forwards_per_block`` is k: the published loop spends k + 1.
    """
    forwards = int(trajectory.num_forwards.sum())
    size = trajectory.block_size
    first_block = trajectory.prompt_len // size
    num_blocks = int((trajectory.row_end // size - first_block).sum())
    revealed = int((trajectory.row_end - trajectory.prompt_len).sum())
    return {
        "revealed": revealed / forwards,
        "kept": int(trajectory.response_len.sum()) / forwards,
        "forwards_per_block": forwards / num_blocks,
        "reference_revealed": revealed / (forwards + num_blocks),
        "ratio_vs_reference": (forwards + num_blocks) / forwards,
    }


def sweep(subject: Subject, plan: Plan, on_run: Callable[[str], None]) -> list[dict[str, float]]:
    """Cost of a token against batch size and response length, beside the published loop at the same size."""
    settings, vocab_size = subject.settings(plan.block_size), subject.forbidden.numel()
    points = [(rows, 32) for rows in (1, 2, 4, 8, 16, 32, 64)] + [(4, length) for length in (64, 128, 256, 512, 1024)]
    rows_of_table = []
    for rows, length in points:
        on_run(f"sweep: {rows} rows x {length} tokens")
        work = Workload.equal(rows, plan.prompt_len, length, vocab_size)
        ours = arms.ours(subject, work, rows, settings)
        loop = arms.reference(subject, work, rows, settings)
        row = {"batch_size": rows, "new_tokens": length, "ms_per_token": 1e3 * ours.seconds_per_token}
        rows_of_table.append(row | {"ratio_vs_hf_batched": loop.seconds_per_token / ours.seconds_per_token})
    return rows_of_table


def _ratio(arm: Arm, ours: Arm) -> dict[str, float]:
    """How many times as long a token takes, repeat by repeat."""
    pairs = zip(arm.outcomes, ours.outcomes, strict=True)
    ratios = sorted(theirs.seconds_per_token / mine.seconds_per_token for theirs, mine in pairs)
    return {"min": ratios[0], "median": statistics.median(ratios), "max": ratios[-1]}


def _identical(ours: Arm, other: Arm) -> float:
    """Share of response tokens that both arms wrote alike, from the same random numbers."""
    mine, theirs = ours.outcomes[-1].token_ids, other.outcomes[-1].token_ids
    assert mine is not None and theirs is not None
    return float((mine == theirs).float().mean())


def _row(arm: Arm) -> dict[str, Any]:
    last, share = arm.outcomes[-1], arm.model_share
    return {
        "name": arm.name,
        "tokens_per_s": 1 / arm.seconds_per_token,
        "num_forwards": last.num_forwards,
        "padding_share": last.padding_share,
        "peak_mib": arm.peak_bytes / 2**20 if arm.peak_bytes else None,
        "model_share": share,
        "is_void": share is not None and share < LEAST_MODEL_SHARE,
    }
