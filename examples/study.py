"""The method beside its alternatives, on real small models: see examples/study/README.md.

    python examples/study.py run                              # every cell that has no result yet, then the figures
    python examples/study.py run --only glassllm-opdlm-1      # some of them
    python examples/study.py run --smoke                      # cut down to minutes, in runs/study_smoke
    python examples/study.py draw                             # figures and tables of the results alone

Runs in a checkout of the repository. A study that was stopped goes on where it was.
"""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from nemo_opdlm.study import plan, runner

_REPOSITORY = Path(__file__).resolve().parent.parent
_STUDY = _REPOSITORY / "examples" / "study"


def main() -> None:
    """Parse the flags and do it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "draw", "list"), help="list: the names of the cells")
    parser.add_argument("--smoke", action="store_true", help="a few short cells of every kind")
    parser.add_argument("--only", nargs="+", metavar="CELL", help="names of cells")
    parser.add_argument(
        "--work_dir", type=Path, help="models and logs (default: runs/study, with --smoke runs/study_smoke)"
    )
    parser.add_argument("--results_dir", type=Path, help="a file for each cell (default: examples/study/cells)")
    args = parser.parse_args()
    work = args.work_dir or Path("runs", "study_smoke" if args.smoke else "study")
    results = args.results_dir or (work / "cells" if args.smoke else _STUDY / "cells")
    cells = list(plan.cells(plan.SMOKE if args.smoke else plan.FULL))
    if unknown := set(args.only or ()) - {cell.name for cell in cells}:
        parser.error(f"--only {' '.join(sorted(unknown))}: no such cell; `list` names them")
    chosen = [cell for cell in cells if not args.only or cell.name in args.only]
    console = Console(highlight=False, markup=False)
    if args.action == "list":
        console.print("\n".join(cell.name for cell in chosen))
        return
    failed = []
    if args.action == "run":
        failed = runner.run_study(chosen, runner.Folders(work.absolute(), results.absolute()), console.print)
    draw(results, work if args.smoke else _STUDY, console)
    sys.exit(int(bool(failed)))


def draw(results: Path, target: Path, console: Console) -> None:
    """Figures beside the results' tables."""
    from nemo_opdlm.study import figures, tables
    from nemo_opdlm.study.results import read_results

    try:
        found = read_results(results)
        files = [*figures.draw(found, target), *tables.write(found, target / "README.md")]
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    console.print("\n".join(f"written: {file}" for file in files))


if __name__ == "__main__":
    main()
