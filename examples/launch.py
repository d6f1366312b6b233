"""Launch a training run through NeMo-Run, on this machine or on a Slurm cluster. Takes the arguments of train_opdlm.py.

    python examples/launch.py +cluster=local +experiment=quickstart
    python examples/launch.py +cluster=slurm cluster.account=ACCOUNT +experiment=quickstart trainer.num_nodes=2
    python examples/launch.py +cluster=slurm cluster.account=ACCOUNT ... dry_run=true    # print the script
    python examples/launch.py -m +cluster=slurm cluster.account=ACCOUNT ... model.seed=1,2    # a job each

docs/launch.md says more.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_opdlm import cli
from nemo_opdlm.config.launch import LaunchConfig, validate_launch

TRAIN = Path(__file__).resolve().parent / "train_opdlm.py"


def launch_sweep(script: str, points: Sequence[cli.Point[LaunchConfig]]) -> int:
    """Launch the runs of a sweep."""
    from nemo_opdlm.launch import submit

    return submit.launch_sweep(TRAIN, points)


@cli.main("gpt_opdlm", LaunchConfig, validate_launch, sweep=launch_sweep)
def main(config: LaunchConfig) -> None:
    """Launch, once the run and its cluster are known to be right."""
    from nemo_opdlm.launch import submit

    sys.exit(submit.launch(TRAIN, config))


if __name__ == "__main__":
    main()
