"""Judge a student beside its AR original: held-out prompts, questions, programs. See conf/evaluate.yaml."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nemo_opdlm import cli
from nemo_opdlm.config.evaluate import EvaluateConfig, validate_evaluate


@contextmanager
def progress(title: str, num_tokens: int) -> Iterator[Callable[..., None]]:
    """A bar of the tokens written, where there is a terminal."""
    from nemo_opdlm.report.progress import RolloutBar

    bar = RolloutBar(title, num_tokens)
    try:
        yield bar
    finally:
        bar.close()


@cli.main("evaluate", EvaluateConfig, validate_evaluate)
def main(config: EvaluateConfig) -> None:
    """Load, measure, print."""
    import json
    import time
    from pathlib import Path

    from rich.console import Console

    from nemo_opdlm.report.quiet import quiet_imports

    quiet_imports()
    from nemo_opdlm.config import to_container
    from nemo_opdlm.data.recordings import Recording, write_recordings
    from nemo_opdlm.evaluation.recording import record
    from nemo_opdlm.evaluation.side_by_side import evaluate
    from nemo_opdlm.report.tables import side_by_side

    console, start = Console(highlight=False, markup=False), time.perf_counter()
    recordings: list[Recording] = []
    on_written = None if config.recording is None else lambda *written: recordings.append(record(*written))
    results = evaluate(config, progress, on_written).as_dict()
    console.print(side_by_side(results["columns"], "AR original and student"))
    for column in results["columns"]:
        console.print(f"log-likelihoods of {column['model']}, {column['mode']}: {column['likelihood']}", style="dim")
    if results["sandbox"]:
        console.print(f"programs were contained by: {', '.join(results['sandbox'])}", style="dim")
    console.print(f"{time.perf_counter() - start:.0f} s", style="dim")
    if config.json is not None:
        Path(config.json).write_text(json.dumps({**results, "config": to_container(config)}, indent=2) + "\n", "utf-8")
    if config.recording is not None:
        write_recordings(config.recording, recordings)


if __name__ == "__main__":
    main()
