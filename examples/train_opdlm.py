"""Train a block-diffusion student on-policy from an AR model. See conf/gpt_opdlm.yaml for the configuration."""

from nemo_opdlm import cli
from nemo_opdlm.config import Config


@cli.main("gpt_opdlm")
def main(config: Config) -> None:
    """Train, once the configuration is known to be right: importing NeMo takes ten seconds."""
    from nemo_opdlm.models.training import train

    train(config)


if __name__ == "__main__":
    main()
