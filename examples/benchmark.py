"""How fast rollouts and updates are, beside what else one could do with the same weights, in one run.

    python examples/benchmark.py rollout                           # SmolLM2-135M on this machine, some minutes
    python examples/benchmark.py rollout --precision bf16 --json rollout.json
    python examples/benchmark.py rollout --sweep                   # also by batch size and response length
    python examples/benchmark.py train                             # SmolLM2-135M on this machine, some minutes
    python examples/benchmark.py train --json train.json --sweep   # also by length, masked share, states and vocabulary

Rollouts: ratios are times per response token, divided by ours: of (b) and (c) the published loop with its cache, a row at a
time and batched; of (d) the same loop without a cache; of (e) autoregressive decoding by transformers.generate.

Updates: ours against the published recipe (two-stream teacher, dense masks, full logits, padded rows) built from Hugging Face
modules, with the same rollouts, recomputation of all activations in both, in fp32.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

#: Figures, and what the terminal shows of them.
Result = tuple[dict[str, Any], Iterator[RenderableType]]


def main() -> None:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    benchmarks = parser.add_subparsers(required=True, metavar="{rollout,train}")
    _add_rollout(benchmarks.add_parser("rollout", help="time of a response token"))
    _add_train(benchmarks.add_parser("train", help="time and memory of an update"))
    args = parser.parse_args()
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: the folder {args.json.parent} does not exist")
    try:
        measure(args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")


def _add_rollout(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(measure=rollout)
    _add_common(parser)
    parser.add_argument("--precision", choices=["32", "bf16"], default="32", help="default: 32")
    parser.add_argument("--batch_size", type=_positive, default=16, help="rows decoded together (default: 16)")
    parser.add_argument("--prompt_len", type=_positive, default=61, help="tokens of a prompt (default: 61)")
    parser.add_argument("--new_tokens", type=_positive, default=128, help="tokens of a response (default: 128)")
    parser.add_argument("--repeats", type=_positive, default=2, help="runs of each arm (default: 2)")


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(measure=train, precision="32")
    _add_common(parser)
    parser.add_argument("--num_rows", type=_positive, default=6, help="rollouts of an update (default: 6)")
    parser.add_argument("--prompt_len", type=_positive, default=48, help="tokens of the longest prompt (default: 48)")
    parser.add_argument("--mean_tokens", type=_positive, default=140, help="mean tokens of a response (default: 140)")
    parser.add_argument("--cap", type=_positive, default=512, help="tokens of the longest response (default: 512)")
    parser.add_argument(
        "--memory_tokens", type=_positive, default=4096, help="row that memory is compared at (default: 4096)"
    )
    parser.add_argument("--pack_to_tokens", type=_positive, default=2048, help="of our micro-batches (default: 2048)")
    parser.add_argument("--repeats", type=_positive, default=2, help="runs of each arm (default: 2)")


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="smollm2", help="glassllm, smollm2 or a Hugging Face folder (default: smollm2)"
    )
    parser.add_argument("--block_size", type=_positive, default=4, help="tokens of a block (default: 4)")
    parser.add_argument("--sweep", action="store_true", help="also sweep the sizes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")


def measure(args: argparse.Namespace) -> None:
    """Run a benchmark and show its figures."""
    from nemo_opdlm.report.quiet import quiet_imports

    quiet_imports()
    import torch

    from nemo_opdlm.benchmark.workload import Subject
    from nemo_opdlm.convert.sources import SOURCES, fetch

    console = Console(highlight=False, markup=False)
    folder = fetch(args.model) if args.model in SOURCES else Path(args.model)
    subject = Subject.load(folder, {"32": torch.float32, "bf16": torch.bfloat16}[args.precision])
    with console.status("") as status:
        figures, shown = args.measure(subject, args, status.update)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    for renderable in shown:
        console.print(renderable)


def rollout(subject: Any, args: argparse.Namespace, on_run: Callable[[str], None]) -> Result:
    """The rollout benchmark."""
    from nemo_opdlm.benchmark import rollouts, tables

    plan = rollouts.Plan(args.batch_size, args.prompt_len, args.new_tokens, args.block_size, args.repeats)
    figures = rollouts.compare(subject, plan, on_run)
    if args.sweep:
        figures["sweep"] = rollouts.sweep(subject, plan, on_run)
    return figures, _shown(tables, figures, [tables.ratio_table(figures)])


def train(subject: Any, args: argparse.Namespace, on_run: Callable[[str], None]) -> Result:
    """The training benchmark."""
    from nemo_opdlm.benchmark import training, training_sweep, training_tables

    plan = training.Plan(
        args.num_rows,
        args.prompt_len,
        args.mean_tokens,
        args.cap,
        args.block_size,
        args.memory_tokens,
        args.pack_to_tokens,
        args.repeats,
    )
    figures = training.compare(subject, plan, on_run)
    if args.sweep:
        figures["sweep"] = training_sweep.sweep(subject, plan, on_run)
    return figures, _shown(training_tables, figures, [])


def _shown(tables: Any, figures: dict[str, Any], more: list[RenderableType]) -> Iterator[RenderableType]:
    yield tables.arm_table(figures)
    yield from more
    if "sweep" in figures:
        yield tables.sweep_table(figures["sweep"])
    yield from tables.remarks(figures)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


if __name__ == "__main__":
    main()
