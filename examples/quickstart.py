"""A real autoregressive language model becomes a block-diffusion one, by on-policy distillation.

    python examples/quickstart.py --model glassllm    # 0.85M parameters, under 5 minutes on two CPU cores
    python examples/quickstart.py --model smollm2     # SmolLM2-135M-Instruct, under half an hour

Everything is written below runs/quickstart or runs/quickstart_smollm2. Another start begins anew.
"""

import argparse
import contextlib
import gc
import json
import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from nemo_opdlm import cli
from nemo_opdlm.config import Config, parse, validate

if TYPE_CHECKING:
    from nemo_opdlm.evaluation.compare import Comparison
    from nemo_opdlm.models.opdlm_model import OPDLMModel

_REPOSITORY = Path(__file__).resolve().parent.parent
_NUM_STAGES = 7
_NUM_SAMPLES = 3


@dataclass(frozen=True)
class Recipe:
    """What is particular to a model.

    Attributes:
        experiment: file in conf/experiment, and name of the run's folder.
        mask_token: a special token that nothing uses: its row of the tied embedding becomes the mask's.
    """

    experiment: str
    mask_token: str


RECIPES = {
    "glassllm": Recipe("quickstart", "<bos>"),
    "smollm2": Recipe("quickstart_smollm2", "<reponame>"),
}


@dataclass(frozen=True)
class Run:
    """Files of a run."""

    model: str
    folder: Path

    @property
    def ar_nemo(self) -> Path:
        """The converted AR model, where the training starts."""
        return self.folder / f"{self.model}.nemo"

    @property
    def student_nemo(self) -> Path:
        """The trained student."""
        return self.folder / "student.nemo"

    @property
    def hf(self) -> Path:
        """The student as a Hugging Face folder."""
        return self.folder / "hf"

    @property
    def log(self) -> Path:
        """exp_manager's folder."""
        return self.folder / "log"

    @property
    def summary(self) -> Path:
        """The figures."""
        return self.folder / "summary.json"

    @property
    def curves(self) -> Path:
        """The picture."""
        return self.folder / "curves.png"

    def clear(self) -> None:
        """Remove what an earlier quickstart left in the places that must be free.

        Raises:
            FileExistsError: something else is there.
        """
        marker = self.folder / ".quickstart"
        results = (self.ar_nemo, self.student_nemo, self.hf, self.log, self.summary, self.curves)
        taken = [path for path in results if path.exists()]
        if taken and not marker.is_file():
            raise FileExistsError(f"{taken[0]} is not from an earlier quickstart: choose another --output_dir")
        self.folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
        for folder in (self.log, self.hf):
            shutil.rmtree(folder, ignore_errors=True)
        self.summary.unlink(missing_ok=True)  # else it would speak for a run that failed


class Story:
    """Tells what is being done, and how long it took."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, markup=False)
        self.start = time.monotonic()
        self._stage = 0

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self.start

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """One of the stages."""
        self._stage += 1
        self.console.print(f"[{self._stage}/{_NUM_STAGES}] {title}", style="bold")
        start = time.monotonic()
        yield
        self.console.print(f"      {time.monotonic() - start:.1f} s", style="dim")

    def text(self, title: str, text: str) -> None:
        """A sample text, as it is but for its margin."""
        self.console.print(f"\n{title}", style="bold")
        self.console.print(textwrap.indent(text, "    ", predicate=lambda line: True), soft_wrap=True)


def main() -> None:
    """Parse the flags, then run all stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(RECIPES), default="glassllm", help="default: glassllm")
    parser.add_argument("--max_steps", type=int, help="optimizer steps (default: the experiment's)")
    parser.add_argument("--output_dir", type=Path, help="default: runs/<experiment>")
    args = parser.parse_args()
    recipe = RECIPES[args.model]
    folder = None if args.output_dir is None else args.output_dir.absolute()
    if not (_REPOSITORY / "pyproject.toml").is_file():
        sys.exit("error: the quickstart runs in a checkout of the repository: its prompts are there")
    os.chdir(_REPOSITORY)  # the experiment's paths are relative to it
    run = Run(args.model, folder or Path("runs", recipe.experiment))
    story = Story()
    story.console.print(f"{args.model}: an autoregressive model becomes a block-diffusion model\n")
    with _one_line_errors():
        config = compose(recipe, run, args.max_steps)
        cli.hide_gpus(config)
        run.clear()
        prepare(recipe, run, story)
        config = validate(config)
    summary = distil(run, config, story)
    story.console.print(
        f"\nAll stages took {summary['seconds']:.0f} s. Figures: {run.summary}, curves: {run.curves}. Write with the "
        f"student:\n\n"
        f"  {sys.executable} examples/generate.py model.restore_from_path={summary['nemo_file']} "
        f"'prompts=[\"Once upon a time\"]' show_steps=true",
        soft_wrap=True,
    )


def compose(recipe: Recipe, run: Run, max_steps: int | None) -> Config:
    """The configuration of ``python examples/train_opdlm.py experiment=...``, in the run's folder.

    Raises:
        ValueError: it is refused.
    """
    composed = cli.compose("gpt_opdlm", [f"experiment={recipe.experiment}"])
    composed.model.restore_from_path = str(run.ar_nemo)
    composed.exp_manager.explicit_log_dir = str(run.log)
    if max_steps is not None:
        composed.trainer.max_steps = max_steps
    return validate(parse(composed), check_files=False)


def prepare(recipe: Recipe, run: Run, story: Story) -> None:
    """Fetch the model, import the frameworks and convert.

    Raises:
        ValueError, OSError, RuntimeError, ImportError: one line.
    """
    from nemo_opdlm.report.quiet import quiet_imports, quiet_runs

    with story.stage(f"Fetch {run.model} (once)"):
        from nemo_opdlm.convert.sources import fetch

        source = fetch(run.model)
    with story.stage("Import NeMo and Megatron"):
        quiet_imports()
        from nemo_opdlm.models import training  # noqa: F401

        quiet_runs()
    with story.stage(f"Convert to {run.ar_nemo}"):
        from nemo_opdlm.models.conversion import convert_hf_to_nemo

        convert_hf_to_nemo(source, run.ar_nemo, mask_token=recipe.mask_token, overwrite=True)


def distil(run: Run, config: Config, story: Story) -> dict[str, Any]:
    """Evaluate, train, evaluate again, save, export and report; returns the summary."""
    from nemo_opdlm.evaluation.compare import NUM_ROLLOUTS, compare, teacher_repeat_4gram
    from nemo_opdlm.models import training
    from nemo_opdlm.models.conversion import convert_nemo_to_hf
    from nemo_opdlm.report.figures import FIGURES
    from nemo_opdlm.report.progress import RolloutBar

    validation = config.model.data.validation_ds
    num_tokens = validation.num_samples * validation.response_length
    with story.stage("Evaluate before the training"):
        model = training.restore(config)[0]
        bar = RolloutBar("Evaluating", (NUM_ROLLOUTS + 1) * num_tokens)
        before, repeat = compare(model, bar), teacher_repeat_4gram(model, bar)
        checksum = model.heldout.checksum
        bar.close()
    del model  # the training builds its own
    gc.collect()
    with story.stage(f"Train: {config.trainer.max_steps} updates from the student's own texts"):
        model = training.train(config)
    with story.stage("Evaluate after the training"):
        bar = RolloutBar("Evaluating", NUM_ROLLOUTS * num_tokens)
        after = compare(model, bar)
        bar.close()
        assert model.heldout.checksum == checksum, "before and after were measured on different held-out sets"
    with story.stage(f"Save {run.student_nemo} and export it to {run.hf}"):
        model.save_to(str(run.student_nemo))
        convert_nemo_to_hf(run.student_nemo, run.hf, "hf")
    summary = {
        "model": run.model,
        "seconds": round(story.seconds, 1),
        "optimizer_steps": model.trainer.global_step,
        "trained_tokens": model.distiller.num_trained_tokens,
        "generated_tokens": model.distiller.num_generated_tokens,
        "before": {figure.name: before.figures[figure.name] for figure in FIGURES},
        "after": {figure.name: after.figures[figure.name] for figure in FIGURES},
        "teacher_repeat_4gram": repeat,
        "heldout_checksum": checksum,
        "nemo_file": str(run.student_nemo),
        "ar_nemo_file": str(run.ar_nemo),
        "hf_dir": str(run.hf),
    }
    report(run, story, summary, before, after, model)
    return summary


def report(
    run: Run, story: Story, summary: dict[str, Any], before: "Comparison", after: "Comparison", model: "OPDLMModel"
) -> None:
    """Table, sample texts, curves and summary."""
    from nemo_opdlm.data.tokenizer import load_tokenizer
    from nemo_opdlm.evaluation.decoding import responses
    from nemo_opdlm.report.curves import plot_curves, read_metrics
    from nemo_opdlm.report.tables import before_after

    teacher = {"repeat_4gram": summary["teacher_repeat_4gram"]}
    story.console.print()
    story.console.print(before_after(before.figures, after.figures, teacher, f"{run.model} before and after"))
    tokenizer = load_tokenizer(run.hf)
    for i in range(min(_NUM_SAMPLES, len(after.responses))):
        prompt = model.heldout_prompts[i].tolist()
        story.text(f"prompt {i + 1}", tokenizer.decode(prompt))
        for name, comparison in (("before", before), ("after", after)):
            response = responses(comparison.responses)[i]
            story.text(f"  {name}", tokenizer.decode(response, skip_special_tokens=True))
    heldout = {0: before.figures["heldout_kl"], summary["optimizer_steps"]: after.figures["heldout_kl"]}
    title = f"{run.model}: {summary['optimizer_steps']} updates of on-policy distillation"
    plot_curves(read_metrics(run.log / "metrics.jsonl"), run.curves, title, heldout)
    run.summary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """End the program with one line where something the user can change is wrong."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
