"""Train a block-diffusion student on-policy from an AR model. See conf/gpt_opdlm.yaml for the configuration.

python examples/train_opdlm.py -m model.opdlm.block_size=4,8 ...    # a sweep, a process per run
"""

from nemo_opdlm import cli
from nemo_opdlm.config import Config
from nemo_opdlm.launch.local_sweep import run_sweep


@cli.main("gpt_opdlm", sweep=run_sweep)
def main(config: Config) -> None:
    """Train, once the configuration is known to be right: importing NeMo takes ten seconds."""
    from nemo_opdlm.models.training import train

    train(config)


if __name__ == "__main__":
    main()
