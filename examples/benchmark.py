"""How fast rollouts are, beside what else one could do with the same weights, in one run.

    python examples/benchmark.py rollout                           # SmolLM2-135M on this machine, some minutes
    python examples/benchmark.py rollout --precision bf16 --json rollout.json
    python examples/benchmark.py rollout --sweep                   # also by batch size and response length

Ratios are times per response token, divided by ours: of (b) and (c) the published loop with its cache, a row at a time and
batched; of (d) the same loop without a cache; of (e) autoregressive decoding by transformers.generate.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console


def main() -> None:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=["rollout"], help="what to measure")
    parser.add_argument("--model", default="smollm2", help="glassllm, smollm2 or a Hugging Face folder (default: smollm2)")
    parser.add_argument("--precision", choices=["32", "bf16"], default="32", help="default: 32")
    parser.add_argument("--batch_size", type=_positive, default=16, help="rows decoded together (default: 16)")
    parser.add_argument("--prompt_len", type=_positive, default=61, help="tokens of a prompt (default: 61)")
    parser.add_argument("--new_tokens", type=_positive, default=128, help="tokens of a response (default: 128)")
    parser.add_argument("--block_size", type=_positive, default=4, help="tokens of a block (default: 4)")
    parser.add_argument("--repeats", type=_positive, default=3, help="runs of each arm (default: 3)")
    parser.add_argument("--sweep", action="store_true", help="also sweep batch size and response length")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file")
    args = parser.parse_args()
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json {args.json}: the folder {args.json.parent} does not exist")
    try:
        measure(args)
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")


def measure(args: argparse.Namespace) -> None:
    """Run the rollout benchmark and show its figures."""
    from nemo_opdlm.report.quiet import quiet_imports

    quiet_imports()
    import torch

    from nemo_opdlm.benchmark import rollouts, tables
    from nemo_opdlm.benchmark.workload import Subject
    from nemo_opdlm.convert.sources import SOURCES, fetch

    console = Console(highlight=False, markup=False)
    folder = fetch(args.model) if args.model in SOURCES else Path(args.model)
    subject = Subject.load(folder, {"32": torch.float32, "bf16": torch.bfloat16}[args.precision])
    plan = rollouts.Plan(args.batch_size, args.prompt_len, args.new_tokens, args.block_size, args.repeats)
    with console.status("") as status:
        figures: dict[str, Any] = rollouts.compare(subject, plan, status.update)
        if args.sweep:
            figures["sweep"] = rollouts.sweep(subject, plan, status.update)
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    console.print(tables.arm_table(figures))
    console.print(tables.ratio_table(figures))
    if args.sweep:
        console.print(tables.sweep_table(figures["sweep"]))
    for remark in tables.remarks(figures):
        console.print(remark)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} must be at least 1")
    return value


if __name__ == "__main__":
    main()
