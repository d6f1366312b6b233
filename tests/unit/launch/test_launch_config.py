"""Keys of a launch: what is unknown, missing or contradictory is refused before anything is submitted."""

from pathlib import Path

import pytest

from nemo_opdlm import cli
from nemo_opdlm.config import parse
from nemo_opdlm.config.launch import LaunchConfig, validate_launch


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    model, prompts = tmp_path / "model.nemo", tmp_path / "prompts.jsonl"
    model.touch()
    prompts.touch()
    return (f"model.restore_from_path={model}", f"model.data.train_ds.file_path={prompts}", "trainer.max_steps=100")


def read(*overrides: str) -> LaunchConfig:
    return validate_launch(parse(cli.compose("gpt_opdlm", list(overrides), LaunchConfig), LaunchConfig))


SLURM = ("+cluster=slurm", "cluster.account=research")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), r"cluster\.type=None must be given: add \+cluster=local or \+cluster=slurm"),
        (("+cluster=slurm",), r"cluster\.account=None must be given"),
        (
            (*SLURM, "+cluster.acount=x"),
            r"cluster\.acount is not a key of this configuration; did you mean cluster\.account\?",
        ),
        (
            (*SLURM, "+run.timelimit=x"),
            r"run\.timelimit is not a key of this configuration; did you mean run\.time_limit\?",
        ),
        ((*SLURM, "cluster.type=slurmd"), r"cluster\.type='slurmd' must be one of 'local', 'slurm' or null"),
        ((*SLURM, "run.time_limit=4h"), r"run\.time_limit='4h' must be a time 'D-HH:MM:SS' or 'HH:MM:SS'"),
        ((*SLURM, "run.time_limit=00:10:00"), r"run\.margin_minutes=15 must be below run\.time_limit='00:10:00'"),
        ((*SLURM, "cluster.signal=B:USR1@60"), r"cluster\.signal='B:USR1@60' must be SIGNAL@SECONDS"),
        ((*SLURM, "cluster.signal=USR1@90000"), r"cluster\.signal='USR1@90000' must come within run\.time_limit"),
        ((*SLURM, "run.name='a b'"), r"run\.name='a b' must be of letters"),
        ((*SLURM, "run.chain=3", "run.dependency=null"), r"run\.chain=3 needs run\.dependency=None to be 'singleton'"),
        (
            (*SLURM, "run.chain=3", "exp_manager.resume_if_exists=false"),
            r"run\.chain=3 needs exp_manager\.resume_if_exists=True",
        ),
        ((*SLURM, "trainer.devices=auto"), r"trainer\.devices='auto' needs cluster\.gpus_per_node=None"),
        (
            (*SLURM, "trainer.devices=4", "cluster.gpus_per_node=8"),
            r"cluster\.gpus_per_node=8 contradicts trainer\.devices=4",
        ),
        ((*SLURM, "trainer.accelerator=cpu", "cluster.gpus_per_node=1"), r"contradicts trainer\.accelerator='cpu'"),
        ((*SLURM, "cluster.container_mounts=[/data:/data]"), r"needs cluster\.container_image"),
        (
            (*SLURM, "cluster.container_image=i.sqsh", "cluster.container_mounts=[data]"),
            r"a list of '/outside:/inside'",
        ),
        ((*SLURM, "cluster.container_image=i.sqsh"), r"lies in no folder of cluster\.container_mounts=\[\]"),
        ((*SLURM, "+cluster.env_vars.http_proxy=x"), r"must be a mapping from names in capitals"),
        ((*SLURM, "model.opdlm.block_size=0"), r"model\.opdlm\.block_size=0 must be from 1 to 64"),
        (("+cluster=local", "cluster.account=x"), r"cluster\.account='x' contradicts cluster\.type='local'"),
        (("+cluster=local", "trainer.num_nodes=2"), r"trainer\.num_nodes=2 contradicts cluster\.type='local'"),
        (("+cluster=local", "run.chain=2"), r"run\.chain=2 contradicts cluster\.type='local'"),
    ],
)
def test_a_wrong_launch_is_refused(files: tuple[str, ...], overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read(*files, *overrides)


@pytest.mark.parametrize(
    ("limit", "time"),
    [("0-04:00:00", "00:03:45:00"), ("12:30:00", "00:12:15:00"), ("7-00:00:00", "06:23:45:00")],
)
def test_training_stops_before_the_time_limit(files: tuple[str, ...], limit: str, time: str) -> None:
    assert read(*files, *SLURM, f"run.time_limit={limit}").exp_manager.max_time_per_run == time


def test_a_time_that_is_given_stays(files: tuple[str, ...]) -> None:
    config = read(*files, *SLURM, "exp_manager.max_time_per_run=00:00:30:00")
    assert config.exp_manager.max_time_per_run == "00:00:30:00"


def test_ranks_are_the_clusters_not_this_machines(files: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "3")
    config = read(
        *files,
        *SLURM,
        "trainer.devices=auto",
        "cluster.gpus_per_node=8",
        "trainer.num_nodes=2",
        "model.global_batch_size=16",
    )
    assert config.trainer.world_size == 16


def test_what_only_the_clusters_gpus_can_do_may_be_launched_from_a_machine_without(files: tuple[str, ...]) -> None:
    fp8 = ("model.transformer_engine=true", "model.fp8=true", "model.fp8_hybrid=true", "model.opdlm.attention=flex")
    assert read(*files, *SLURM, *fp8).model.fp8
    with pytest.raises(ValueError, match="must be|needs"):
        read(*files, *SLURM, *fp8, "model.fp8_e4m3=true")
    with pytest.raises(ValueError, match="needs"):
        read(*files, *SLURM, *fp8, "trainer.accelerator=cpu")


LEAVES = sorted(path.stem for path in (cli.CONF / "training" / "opdlm").glob("*.yaml"))


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_is_its_experiment_with_the_launchers_run_block(leaf: str) -> None:
    config = parse(cli.compose("gpt_opdlm", [f"+training=opdlm/{leaf}"]))
    assert config.run.name == f"opdlm_{leaf}"
    assert config.exp_manager.explicit_log_dir == f"{config.run.results_dir}/results"
    experiment = parse(cli.compose("gpt_opdlm", [f"experiment={leaf}"]))
    assert (config.model, config.trainer) == (experiment.model, experiment.trainer)


def test_every_experiment_with_a_network_has_a_leaf_that_slurm_takes(files: tuple[str, ...]) -> None:
    experiments = {path.stem for path in (cli.CONF / "experiment").glob("paper_*.yaml")} - {"paper_math"}
    assert {leaf for leaf in LEAVES if leaf.startswith("paper")} == experiments
    for leaf in experiments:
        config = read(*files, *SLURM, f"+training=opdlm/{leaf}")
        assert (config.trainer.devices, config.trainer.num_nodes, config.job_name) == (8, 1, f"opdlm_{leaf}")
