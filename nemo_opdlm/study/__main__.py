"""Starts a stage of a cell; `examples/study.py` calls it."""

import argparse
from pathlib import Path

from nemo_opdlm import cli
from nemo_opdlm.config import parse, validate


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(prog="python -m nemo_opdlm.study", description=__doc__)
    parser.add_argument("--student", type=Path, required=True, help=".nemo file to write")
    parser.add_argument("--result", type=Path, required=True, help="JSON file to write")
    parser.add_argument("overrides", nargs="+", help="as for examples/train_opdlm.py")
    args = parser.parse_args()
    config = validate(parse(cli.compose("gpt_opdlm", args.overrides)))
    cli.hide_gpus(config)
    from nemo_opdlm.report.quiet import quiet_imports

    quiet_imports()
    from nemo_opdlm.study.stage import run

    run(config, args.student, args.result)


if __name__ == "__main__":
    main()
