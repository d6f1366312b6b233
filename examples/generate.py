"""Write text with a model, by block diffusion or from left to right. See conf/generate.yaml for the configuration."""

from typing import TYPE_CHECKING

from nemo_opdlm import cli
from nemo_opdlm.config.generate import GenerateConfig, validate_generate

if TYPE_CHECKING:
    from nemo_opdlm.diffusion.trajectory import Trajectory
    from nemo_opdlm.evaluation.generation import Generator


@cli.main("generate", GenerateConfig, validate_generate)
def main(config: GenerateConfig) -> None:
    """Load, write, print."""
    import time

    from nemo_opdlm.report.quiet import quiet_imports

    quiet_imports()
    from nemo_opdlm.evaluation.generation import Generator, prompt_rows
    from nemo_opdlm.report.progress import RolloutBar

    rows = prompt_rows(config)
    generator = Generator.load(str(config.model.restore_from_path))
    prompts = generator.encode(rows, config.chat_template)
    bar = RolloutBar("Writing", len(prompts) * config.max_new_tokens)
    start = time.perf_counter()
    trajectory = generator.generate(prompts, config, bar)
    seconds = time.perf_counter() - start
    bar.close()
    show(generator, trajectory, config, seconds)


def show(generator: "Generator", trajectory: "Trajectory", config: GenerateConfig, seconds: float) -> None:
    """Print prompts, responses and figures; colours only on a terminal."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    texts = generator.texts(trajectory)
    for number, text in enumerate(texts):
        row = trajectory.index(slice(number, number + 1))
        prompt_len, response_len = int(row.prompt_len), int(row.response_len)
        prompt = generator.tokenizer.decode(row.token_ids[0, :prompt_len])
        console.print(f"--- prompt {number + 1}: {prompt_len} tokens", style="dim")
        console.print(prompt)
        console.print(
            f"--- response {number + 1}: {_figures(response_len, int(row.num_forwards))}, "
            f"ended by {'the model' if row.is_end_token.any() else 'the length limit'}",
            style="dim",
        )
        console.print(text, style="bold")
        if config.show_steps:
            console.print(_steps(generator, row), end="")
        console.print()
    total, forwards = int(trajectory.response_len.sum()), int(trajectory.num_forwards.sum())
    blocks = "" if config.mode == "autoregressive" else f" in blocks of {trajectory.block_size}"
    console.print(
        f"in all, by {config.mode} decoding{blocks}: {_figures(total, forwards)}, {total / seconds:.0f} tokens/s"
    )


def _figures(num_tokens: int, num_forwards: int) -> str:
    return f"{num_tokens} tokens, {num_forwards} forwards, {num_tokens / num_forwards:.2f} tokens per forward"


def _steps(generator: "Generator", row: "Trajectory") -> object:
    """The order of unmasking of one response."""
    from nemo_opdlm.report.steps import unmasking_order

    places = row.is_response[0]
    blocks = places.nonzero()[:, 0] // row.block_size
    return unmasking_order(
        generator.pieces(row.token_ids[0, places]), row.unmask_step[0, places].tolist(), blocks.tolist()
    )


if __name__ == "__main__":
    main()
