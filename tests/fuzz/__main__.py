"""Fuzz the readers: `python -m tests.fuzz [--inputs N] [--seconds S] [--seed K] [--reader NAME] [--replay FILE]`."""

import argparse
import contextlib
import logging
import os
import resource
import sys
import warnings
from collections import Counter
from pathlib import Path

logging.disable(logging.CRITICAL)  # before what follows is imported, which takes seconds and tells a lot
warnings.simplefilter("ignore")

from tests.fuzz import readers  # noqa: E402
from tests.fuzz.engine import attempt, fuzz, load, save  # noqa: E402

#: Address space beyond what the libraries take: an input that claims terabytes must not get them.
_ROOM = 8 * 2**30


def main() -> int:
    """Print what became of the inputs; 1 if one broke a reader."""
    parser = argparse.ArgumentParser(description="Feed the readers with strange inputs; a failing one is kept.")
    parser.add_argument("--inputs", type=int, default=100_000, help="over all readers, at least")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="for each reader, at most")
    parser.add_argument("--seed", type=int, default=0, help="another one draws other inputs, the same one the same")
    parser.add_argument("--reader", choices=readers.NAMES, action="append", help="only this one; may be repeated")
    parser.add_argument("--failures", type=Path, default=Path("fuzz-failures"), help="where failing inputs are kept")
    parser.add_argument("--replay", type=Path, help="a kept input, to be read once more")
    parser.add_argument("--messages", type=int, default=0, help="print so many of the most frequent refusals")
    arguments = parser.parse_args()
    if arguments.replay is not None:
        name, case = load(arguments.replay)
        with readers.scratch() as folder:
            print(attempt(readers.reader(name, folder), case))
        return 0
    with open(os.dup(1), "w") as table, contextlib.redirect_stdout(table):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the Rust libraries print
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    names, total, seconds = arguments.reader or readers.NAMES, Counter[str](), 0.0
    print(f"{'reader':14} {'inputs':>8} {'read':>8} {'refused':>8} {'failed':>8} {'seconds':>8}")
    for name in names:
        with readers.scratch() as folder:
            reader = readers.reader(name, folder)
            _limit_memory()
            inputs = arguments.inputs if len(names) == 1 else round(arguments.inputs * reader.share)
            tally = fuzz(reader, arguments.seed, inputs, arguments.seconds)
        read, refused, broken = (tally.outcomes[name] for name in ("read", "refused", "failed"))
        print(f"{name:14} {tally.outcomes.total():8} {read:8} {refused:8} {broken:8} {tally.seconds:8.1f}", flush=True)
        total += tally.outcomes
        seconds += tally.seconds
        for message, count in tally.messages.most_common(arguments.messages):
            print(f"    {count:6} {message}")
        for place, (case, failure) in tally.failures.items():
            print(f"    FAILED at {place}, kept as {save(reader, case, arguments.failures)}: {case}\n{failure}")
    print(f"{'all':14} {total.total():8} {total['read']:8} {total['refused']:8} {total['failed']:8} {seconds:8.1f}")
    return 1 if total["failed"] else 0


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + _ROOM, resource.RLIM_INFINITY))


if __name__ == "__main__":
    sys.exit(main())
