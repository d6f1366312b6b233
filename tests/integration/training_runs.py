"""Training as the command line starts it, in this process: importing NeMo takes longer than a whole tiny run."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

from nemo_opdlm import cli
from nemo_opdlm.config import Config, parse, validate
from nemo_opdlm.models.conversion import convert_hf_to_nemo
from nemo_opdlm.models.opdlm_model import OPDLMModel
from nemo_opdlm.models.training import train
from nemo_opdlm.testing import tiny

EXAMPLES = Path(__file__).parents[2] / "examples"
#: What every run of these tests has in common.
COMMON = (
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "trainer.precision=32",
    "trainer.log_every_n_steps=1",
    "exp_manager.create_tensorboard_logger=false",
    "model.log_samples_every_n_steps=null",
    "exp_manager.seconds_to_sleep=0",
)
#: A run on `write_tiny_archive`: 8 prompts of 1 to 8 tokens per rollout step, two updates of 4.
TINY = (
    "trainer.max_steps=2",
    "trainer.val_check_interval=2",
    "exp_manager.create_checkpoint_callback=false",
    "model.micro_batch_size=2",
    "model.global_batch_size=4",
    "model.optim.lr=1e-2",
    "model.optim.sched.min_lr=1e-3",
    "model.optim.sched.warmup_steps=0",
    "model.data.train_ds.max_prompt_length=8",
    "model.data.validation_ds.max_prompt_length=8",
    "model.data.validation_ds.num_samples=4",
    "model.data.validation_ds.response_length=6",
    "model.opdlm.rollout.num_prompts_per_step=8",
    "model.opdlm.rollout.max_new_tokens=10",
    "model.opdlm.rollout.threshold=0.06",
)


def write_tiny_archive(folder: Path, family: str = "qwen3-tied-wide-heads", seed: int = 0) -> Path:
    """A `.nemo` archive of a random model, made by way of Hugging Face as users make theirs."""
    archive = folder / f"{family}-{seed}.nemo"
    convert_hf_to_nemo(tiny.write_hf_folder(folder / f"hf-{family}-{seed}", family, seed), archive)
    return archive


def write_prompts(path: Path, num_prompts: int = 24) -> Path:
    """Prompts of the tiny tokenizer's words, 1 to 8 of them, and responses of 1 to 13 for those who ask for them."""

    def words(first: int, count: int) -> str:
        return " ".join(f"w{4 + (first + word) % 36}" for word in range(count))

    rows = [
        {"prompt": words(3 * row, 1 + row % 8), "response": " " + words(5 * row, 1 + 5 * row % 13)}
        for row in range(num_prompts)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_inputs(folder: Path) -> tuple[str, ...]:
    """Overrides that name a new tiny archive and prompt file."""
    prompts = write_prompts(folder / "prompts.jsonl")
    return (
        f"model.restore_from_path={write_tiny_archive(folder)}",
        f"model.data.train_ds.file_path={prompts}",
        f"model.data.validation_ds.file_path={prompts}",
    )


def configure(*overrides: str) -> Config:
    """The checked configuration of a command line."""
    return validate(parse(cli.compose("gpt_opdlm", list(overrides)), Config))


def run(log_dir: Path, *overrides: str) -> OPDLMModel:
    """Train; later overrides win."""
    return train(configure(*COMMON, f"exp_manager.explicit_log_dir={log_dir}", *_last_wins(overrides)))


def read_metrics(log_dir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`."""
    return [json.loads(line) for line in (log_dir / "metrics.jsonl").read_text().splitlines()]


def run_script(script: str, *arguments: str) -> int | str:
    """Run a script of `examples/` in this process; returns its exit code, or the message it exits with."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [script, *arguments])
        # A refused command leaves it at 1, and its process is meant to end.
        patch.setenv("HYDRA_FULL_ERROR", "0")
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as exit_:
            return exit_.code or 0
    return 0


def _last_wins(overrides: tuple[str, ...]) -> list[str]:
    return list({override.partition("=")[0]: override for override in overrides}.values())
