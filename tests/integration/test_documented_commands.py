"""The commands of the documentation run as they stand there, with tiny models and cut down by further arguments."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nemo_opdlm.launch import summary
from nemo_opdlm.models.conversion import convert_hf_to_nemo
from nemo_opdlm.testing import tiny
from tests import forked
from tests.documented import REPOSITORY, Command, commands
from tests.integration.training_runs import run_script, write_prompts

#: One update of two short responses on one rank of a CPU.
TRAIN = (
    *("trainer=cpu", "precision=fp32", "parallel=dp", "optim=adamw", "opdlm/curriculum=none", "model=from_checkpoint"),
    *("trainer.devices=1", "trainer.max_steps=1", "trainer.val_check_interval=1", "trainer.enable_progress_bar=false"),
    *("model.tensor_model_parallel_size=1", "model.pipeline_model_parallel_size=1"),
    *("model.micro_batch_size=2", "model.global_batch_size=2"),
    *("model.optim.sched.max_steps=20", "model.optim.sched.warmup_steps=2"),
    *("model.data.train_ds.max_prompt_length=32", "model.opdlm.rollout.num_prompts_per_step=2"),
    *("model.opdlm.rollout.max_new_tokens=8", "model.opdlm.rollout.domain_caps=null"),
    *("model.data.validation_ds.num_samples=2", "model.data.validation_ds.response_length=4"),
    "exp_manager.seconds_to_sleep=0",
)
#: Script -> what cuts its commands down; those of the others are short.
CUT_DOWN = {
    "train_opdlm": TRAIN,
    "convert_hf_to_nemo": ("--overwrite",),
    "generate": ("max_new_tokens=8",),
    "evaluate": (
        *("num_questions=2", "max_new_tokens=4", "num_samples=2"),
        *("validation_ds.num_samples=2", "validation_ds.response_length=4"),
    ),
}
#: What a command holds -> why it is not run here.
NOT_RUN = {
    "make quickstart": "test_quickstart.py runs its script, cut to four updates; SmolLM2 takes half an hour",
    "make test": "it runs this",
    "make study": "test_study.py checks what it would start; the cut-down one takes minutes",
    "make fault-injection": "tests/faults is a part of all tests, with fewer kills",
    "make fuzz": "tests/fuzz is a part of all tests, with fewer inputs",
    "pip install": "it needs a network",
    "train_opdlm.py -m": "test_launch.py trains a sweep, in processes of its own",
}


def why_not(command: Command) -> str | None:
    return next((reason for part, reason in NOT_RUN.items() if part in str(command)), None)


HERE = [command for command in commands() if why_not(command) is None and command.script != "launch"]
LAUNCHES = [command for command in commands() if command.script == "launch"]


def test_every_command_is_run_or_it_is_said_why_not() -> None:
    assert all(command.script for command in HERE)
    for part in NOT_RUN:
        assert any(part in str(command) for command in commands()), f"no page says {part}"


@pytest.fixture(scope="module")
def place(glassllm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that commands name."""
    place = tmp_path_factory.mktemp("documented")
    (place / "examples").symlink_to(REPOSITORY / "examples")
    # As wide as Qwen3's vocabulary, in whose place of the mask token serving engines look.
    tiny.write_hf_folder(place / "Qwen3-4B", vocab_size=151936, hidden_size=8)
    convert_hf_to_nemo(place / "Qwen3-4B", place / "qwen3.nemo")
    (place / "runs" / "quickstart").mkdir(parents=True)
    for name in ("ar.nemo", "student.nemo", "runs/quickstart/glassllm.nemo", "runs/quickstart/student.nemo"):
        convert_hf_to_nemo(glassllm_folder, place / name, mask_token="<bos>", block_size=4)
    prompts = write_prompts(place / "prompts.jsonl").read_text().splitlines()
    pq.write_table(pa.Table.from_pylist([json.loads(line) for line in prompts]), place / "prompts.parquet")
    for run in ("a", "b", "quickstart/log"):
        folder = place / "runs" / run
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text('{"global_step": 1, "train/loss": 1.0}\n', encoding="utf-8")
    swept = summary.Row({"model.seed": "1"}, place / "FOLDER" / "model.seed=1", max_steps=1, status=summary.FINISHED)
    summary.write(place / "FOLDER", [swept])
    return place


def cut_down(command: Command) -> list[str]:
    """The command's arguments with those that cut it down, which win."""
    arguments = (*command.arguments, *CUT_DOWN.get(str(command.script), ()))
    return list({argument.partition("=")[0].lstrip("+"): argument for argument in arguments}.values())


def run_page(place: Path, page: str, output: Path) -> None:
    """The commands of a page one after the other, in a process of their own: scripts leave much behind in theirs."""
    os.chdir(place)
    stream = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    for command in HERE:
        if command.page == page and (code := run_script(f"{command.script}.py", *cut_down(command))):
            sys.exit(f"{command}: {code}")


@pytest.mark.parametrize("page", dict.fromkeys(command.page for command in HERE))
def test_the_commands_of_a_page_run(page: str, place: Path, tmp_path: Path) -> None:
    output = tmp_path / "output.txt"
    process = forked.server().Process(target=run_page, args=(place, page, output))
    process.start()
    process.join(timeout=250)
    process.kill()
    process.join()
    assert process.exitcode == 0, output.read_text(encoding="utf-8")[-3000:]


DRY_RUNS = """
import json, runpy, sys

for arguments in json.loads(sys.argv[1]):
    sys.argv = ["examples/launch.py", *arguments]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit_:
        if exit_.code:
            raise
"""


def test_launches_print_what_they_would_start(place: Path) -> None:
    """In a process of their own: NeMo-Run takes over standard error."""
    if find_spec("nemo_run") is None:
        pytest.skip("needs requirements-launch.txt")
    dry_runs = json.dumps([list(dict.fromkeys((*command.arguments, "dry_run=true"))) for command in LAUNCHES])
    environment = {**os.environ, "NEMORUN_HOME": str(place / "home"), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUNS, dry_runs],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("#SBATCH --account=ACCOUNT") >= len(LAUNCHES) - 1
