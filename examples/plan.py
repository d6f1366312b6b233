"""Print how much memory a training run will need, from its configuration alone: takes the arguments of train_opdlm.py.

Without model.restore_from_path it is the network of a group, e.g. model=qwen3_4b; prompts are not read.
"""

from functools import partial

from nemo_opdlm import cli
from nemo_opdlm.config import Config, validate


@cli.main("gpt_opdlm", check=partial(validate, check_files=False))
def main(config: Config) -> None:
    """Read the shapes of the networks, count, print."""
    from nemo_opdlm.report.quiet import quiet_imports

    quiet_imports()
    from rich.console import Console

    from nemo_opdlm.models.memory_plan import plan_run
    from nemo_opdlm.report.memory import memory_table, stage_table

    console, plan = Console(), plan_run(config)
    console.print(memory_table(config, plan))
    if len(plan.stages) > 1:
        console.print(stage_table(plan))


if __name__ == "__main__":
    main()
