"""One HTML page about training runs: figures, curves, KL by mask ratio, samples; several runs are compared.

    python examples/report.py runs/quickstart                        # writes runs/quickstart/report/index.html
    python examples/report.py runs/a runs/b --output runs/a_and_b

The page loads nothing from the network; the curves stand beside it as PNGs, too.
"""

import argparse
import sys
from pathlib import Path


def main() -> None:
    """Read the runs, write the page and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR", help="a run's folder, or its log folder")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder to write to (default: report/ in the first run)"
    )
    args = parser.parse_args()
    from nemo_opdlm.report.page import write_report
    from nemo_opdlm.report.runs import read_runs

    try:
        page, *pictures = write_report(read_runs(args.run_dirs), args.output or args.run_dirs[0] / "report")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{page}, and beside it {len(pictures)} pictures")


if __name__ == "__main__":
    main()
