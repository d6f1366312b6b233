"""Sweeps: every run is checked before any starts, has its own folder, and is reported whatever becomes of the others."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_opdlm import cli
from nemo_opdlm.config import Config, parse
from nemo_opdlm.launch import jobs, summary
from nemo_opdlm.launch.local_sweep import run_sweep

REPOSITORY = Path(__file__).resolve().parents[3]
#: Trains as far as a job needs to: a step more than it finds, and fails where the seed is 13.
SCRIPT = """\
import json, pathlib, sys
from omegaconf import OmegaConf
folder, name = (argument.partition("=")[2] for argument in sys.argv[1:])
config = OmegaConf.load(pathlib.Path(folder) / f"{name}.yaml")
metrics = pathlib.Path(config.exp_manager.explicit_log_dir) / "metrics.jsonl"
rows = metrics.read_text().splitlines() if metrics.is_file() else []
row = {"global_step": len(rows) + 1, "train/loss": config.model.seed / 2, "rollout/tokens_per_s": 100.0}
metrics.write_text("".join(line + "\\n" for line in [*rows, json.dumps(row)]))
sys.exit(3 if config.model.seed == 13 else 0)
"""


def point(folder: Path, seed: int, **changes: str) -> cli.Point[Config]:
    overrides = ["trainer.max_steps=2", f"exp_manager.explicit_log_dir={folder}", f"model.seed={seed}"]
    swept = {"model.seed": str(seed), **changes}
    return cli.Point(swept, parse(cli.compose("gpt_opdlm", overrides)))


def multirun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "examples" / "train_opdlm.py"), "-m", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_failed_job_does_not_stop_the_others_and_the_same_sweep_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    script, folder = tmp_path / "train.py", tmp_path / "sweep"
    script.write_text(SCRIPT)
    points = [point(folder, 13), point(folder, 14)]
    assert run_sweep(script, points) == 1
    assert [row.status for row in summary.read(folder)] == ["failed (3)", "stopped"]
    assert run_sweep(script, points) == 1
    first, second = csv.DictReader((folder / summary.FILE).open())
    assert (first["model.seed"], first["status"], first["step"]) == ("13", "failed (3)", "2")
    assert (second["model.seed"], second["status"], second["train/loss"]) == ("14", "finished", "7.0")
    shown = capfd.readouterr().err
    assert "failed (3)" in shown and "finished" in shown


def test_a_sweep_over_further_values_keeps_the_rows_of_the_earlier_ones(tmp_path: Path) -> None:
    script, folder = tmp_path / "train.py", tmp_path / "sweep"
    script.write_text(SCRIPT)
    run_sweep(script, [point(folder, 1), point(folder, 2)])
    run_sweep(script, [point(folder, 2), point(folder, 3)])
    assert [(row.swept["model.seed"], row.metrics()["step"]) for row in summary.read(folder)] == [
        ("1", 1),
        ("2", 2),
        ("3", 1),
    ]


def test_a_job_reads_the_configuration_it_was_given(tmp_path: Path) -> None:
    given = point(tmp_path, 5)
    _, (job,) = jobs.sweep([given], "name")
    job.write()
    read = parse(cli.compose("config", config_path=job.folder))
    assert read == job.config
    assert read.model == given.config.model
    assert job.log_dir == tmp_path / "model.seed=5"


def test_folders_are_named_after_what_was_swept(tmp_path: Path) -> None:
    assert (
        jobs.folder_name({"model.seed": "1", "model.opdlm.block_size": "8"}) == "model.opdlm.block_size=8+model.seed=1"
    )
    paths = [jobs.folder_name({"model.restore_from_path": f"/models/{name}.nemo"}) for name in ("a", "b")]
    assert len(set(paths)) == 2 and not any("/" in path for path in paths)
    assert len(jobs.folder_name({"name": "x" * 500})) <= 120
    with pytest.raises(ValueError, match="model.seed=1 stands twice in this sweep"):
        jobs.sweep([point(tmp_path, 1), point(tmp_path, 1)], "name")


def test_half_a_line_of_metrics_is_not_read(tmp_path: Path) -> None:
    row = summary.Row({}, tmp_path, 4)
    assert row.metrics()["step"] == 0
    (tmp_path / "metrics.jsonl").write_text(
        json.dumps({"global_step": 1, "val_loss": 2.0}) + '\n{"global_step": 2, "val'
    )
    assert row.metrics() | {"step": 1, "val_loss": 2.0} == row.metrics()


def test_a_run_has_ended_with_its_steps_or_with_its_trained_tokens(tmp_path: Path) -> None:
    rows = [summary.Row({"a": "1"}, tmp_path / str(tokens), 4, max_trained_tokens=tokens) for tokens in (None, 50, 60)]
    for row in rows:
        row.log_dir.mkdir()
        (row.log_dir / "metrics.jsonl").write_text(json.dumps({"global_step": 2, "trained_tokens": 55.0}) + "\n")
    summary.write(tmp_path, rows)
    assert summary.read(tmp_path) == rows and [row.has_ended for row in rows] == [False, True, False]


def test_a_sweep_is_not_for_the_ranks_of_a_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="call it without torchrun and srun"):
        run_sweep(tmp_path / "train.py", [point(tmp_path, 1)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model.opdlm.block_size=4",), "--multirun needs a key with several values"),
        (("model.opdlm.blok_size=4,8",), "model.opdlm.blok_size is not a key of this configuration"),
        (("model.opdlm.block_size=4,x",), "model.opdlm.block_size=x: model.opdlm.block_size='x' must be an integer"),
        (("--cfg", "job", "model.seed=1,2"), "--cfg does not go with --multirun"),
    ],
)
def test_a_wrong_sweep_is_one_line_before_anything_runs(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    model, prompts = tmp_path / "model.nemo", tmp_path / "prompts.jsonl"
    model.touch()
    prompts.touch()
    files = (f"model.restore_from_path={model}", f"model.data.train_ds.file_path={prompts}")
    finished = multirun(*files, "trainer.max_steps=100", f"exp_manager.explicit_log_dir={tmp_path / 'log'}", *arguments)
    assert finished.returncode == 2
    assert finished.stderr.startswith("error: ") and message in finished.stderr and finished.stderr.count("\n") == 1
    assert not (tmp_path / "log").exists()
