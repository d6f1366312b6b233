"""Show how the jobs of a sweep stand: `python examples/sweep_table.py FOLDER`, where FOLDER holds the sweep's sweep.csv."""

import argparse
import sys
from pathlib import Path

from rich.console import Console


def main() -> None:
    """Ask Slurm for the jobs that it has, read what all have written, print and write the table.

    The exit code is 1 if a job is neither finished nor still in the queue.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="of the sweep")
    folder = parser.parse_args().folder
    from nemo_opdlm.launch import summary

    try:
        rows = [summary.refreshed(row) for row in summary.read(folder)]
        summary.write(folder, rows)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    Console(highlight=False, markup=False).print(summary.table(rows))
    sys.exit(int(not all(row.is_well for row in rows)))


if __name__ == "__main__":
    main()
