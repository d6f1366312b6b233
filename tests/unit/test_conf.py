"""`conf/`: every choice, experiment and sensible combination is valid; groups and experiments keep out of each other's way."""

import functools
import itertools
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf

from nemo_opdlm import cli
from nemo_opdlm.config import Architecture, Config, parse, to_container, validate
from nemo_opdlm.config import precision as precision_checks
from nemo_opdlm.config.groups import read_groups
from nemo_opdlm.config.precision import Machine

#: Group -> its default, from the defaults list.
DEFAULTS = {
    group: choice
    for entry in OmegaConf.load(cli.CONF / "gpt_opdlm.yaml").defaults
    if isinstance(entry, DictConfig)
    for group, choice in entry.items()
}
GROUPS = {group: choices for group, choices in read_groups(cli.CONF).items() if group in DEFAULTS}
EXPERIMENTS = GROUPS.pop("experiment")
PAPER = [name for name in EXPERIMENTS if name.startswith("paper")]
#: What a run has to be given, or a choice asks for.
GIVEN = {"trainer": {"max_steps": 200}, "model": {"opdlm": {"rollout": {"max_new_tokens": 64}}}}


@pytest.fixture(autouse=True)
def newest_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which every precision is there."""
    monkeypatch.setattr(precision_checks, "find_machine", lambda accelerator: Machine("2.15.0", (10, 0)))


@functools.cache
def read(group: str, choice: str) -> dict[str, Any]:
    """What a file of a group holds, below its package."""
    text = (cli.CONF / group / f"{choice}.yaml").read_text(encoding="utf-8")
    package = re.match(r"# @package (\S+)\n", text)
    assert package is not None, f"{group}/{choice}.yaml starts with its package"
    body = OmegaConf.to_container(OmegaConf.create(text) or OmegaConf.create(), resolve=False)
    assert isinstance(body, dict)
    inherited: dict[str, Any] = {}
    for parent in body.pop("defaults", []):
        if parent != "_self_" and group != "experiment":
            inherited = merged(inherited, read(group, parent))
    for section in reversed([] if package[1] == "_global_" else package[1].split(".")):
        body = {section: body}
    return merged(inherited, body)


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, as Hydra merges two files."""
    result = dict(base)
    for key, value in over.items():
        is_section = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if is_section else value
    return result


def leaves(section: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@functools.cache
def composed(*overrides: str) -> dict[str, Any]:
    plain = OmegaConf.to_container(cli.compose("gpt_opdlm", overrides))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def checked(config: dict[str, Any], world_size: int | None = None) -> Config:
    """The configuration, valid; with so many ranks of it."""
    if world_size is not None:
        config = merged(config, {"trainer": {"devices": world_size, "num_nodes": 1, "accelerator": "gpu"}})
    return validate(parse(config), check_files=False, environment={})


def ranks_of(parallel: str) -> int:
    """Ranks that hold one copy of the network."""
    sizes = dict(leaves(read("parallel", parallel)))
    model_parallel = [
        sizes.get(f"model.{axis}_parallel_size", 1) for axis in ("tensor_model", "pipeline_model", "context")
    ]
    return math.prod(model_parallel)


# --- composition ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(max(map(len, GROUPS.values()))))
def test_every_choice_of_every_group_is_valid(number: int) -> None:
    """The first choices of all groups together, then the second ones, and so on."""
    chosen = {group: choices[number % len(choices)] for group, choices in GROUPS.items()}
    chosen |= {"model": "from_checkpoint"}  # networks and layouts: below
    overrides = [
        *(f"{group}={choice}" for group, choice in chosen.items()),
        *(f"{key}={value}" for key, value in leaves(GIVEN)),
    ]
    config = composed(*overrides)
    expected = to_container(Config())
    for group, choice in chosen.items():
        expected = merged(expected, read(group, choice))
    assert config == OmegaConf.to_container(OmegaConf.create(merged(expected, GIVEN)))
    checked(config, ranks_of(chosen["parallel"]))


@pytest.mark.parametrize(
    "groups",
    [("parallel", "precision", "optim"), ("opdlm/rollout", "opdlm/states", "opdlm/divergence", "opdlm/curriculum")],
)
def test_choices_of_groups_that_meet_are_valid_together(groups: tuple[str, ...]) -> None:
    for choices in itertools.product(*(GROUPS[group] for group in groups)):
        config = GIVEN
        for group, choice in zip(groups, choices, strict=True):
            config = merged(config, read(group, choice))
        checked(config, ranks_of(choices[0]) if groups[0] == "parallel" else 1)


#: Layouts that do not divide a network, with what the refusal names.
UNDIVIDED = {
    "tiny": {"tp4": "num_query_groups=2", "tp8": "num_attention_heads=4", "tp4_pp2": "num_query_groups=2"},
    "smollm2_135m": {
        **dict.fromkeys(("tp2", "tp4", "tp8", "tp2_pp2", "tp2_cp2", "tp4_pp2"), "num_attention_heads=9"),
        **dict.fromkeys(("pp4", "pp2_vpp2"), "num_layers=30"),
    },
    "qwen2_5_0_5b": dict.fromkeys(("tp4", "tp8", "tp4_pp2"), "num_attention_heads=14"),
}


@pytest.mark.parametrize("model", GROUPS["model"])
def test_a_layout_divides_a_network_or_is_refused(model: str) -> None:
    for parallel in GROUPS["parallel"]:
        config = merged(merged(GIVEN, read("model", model)), read("parallel", parallel))
        expected = UNDIVIDED.get(model, {}).get(parallel)
        if expected is None:
            checked(config, ranks_of(parallel))
            continue
        with pytest.raises(ValueError, match=f"must divide .*{expected}.*nearest values that work: "):
            checked(config, ranks_of(parallel))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_is_valid_in_every_layout(experiment: str) -> None:
    config = composed(f"experiment={experiment}")
    if config["trainer"]["max_steps"] is None:
        config = merged(config, {"trainer": {"max_steps": 7728}})
    assert checked(config).model.opdlm.block_size == (8 if experiment == "block_size_curriculum" else 4)
    for parallel in GROUPS["parallel"]:
        checked(merged(config, read("parallel", parallel)), ranks_of(parallel))


@pytest.mark.parametrize(
    "ablation", ["random_mask", "off_policy", "sft_baseline", "sft_dataset", "block_size_curriculum"]
)
def test_ablations_combine_with_the_paper(ablation: str) -> None:
    config = checked(composed(f"experiment=[paper_4b,{ablation}]"))
    opdlm = config.model.opdlm
    assert (config.trainer.devices, config.trainer.max_steps, config.model.num_layers) == (8, 7728, 36)
    is_sft = ablation.startswith("sft")
    assert (opdlm.divergence_top_k, opdlm.divergence) == ((0, "nll") if is_sft else (16, "forward_kl"))
    of_others = {"off_policy": "teacher", "sft_baseline": "teacher", "sft_dataset": "dataset"}
    assert opdlm.responses == of_others.get(ablation, "student")


def test_a_later_stage_of_the_block_size_curriculum_is_not_its_own_teacher(tmp_path: Path) -> None:
    for name in ("student.nemo", "prompts.jsonl"):
        (tmp_path / name).touch()
    data = {"train_ds": {"file_path": str(tmp_path / "prompts.jsonl")}}
    given = {"model": {"restore_from_path": str(tmp_path / "student.nemo"), "data": data}}
    config = parse(merged(composed("experiment=[paper_4b,block_size_curriculum]"), given))
    with pytest.raises(FileNotFoundError, match="^model.kd_teacher_restore_from_path="):
        validate(config, environment={})


def test_a_choice_can_be_added_as_well_as_set() -> None:
    added = composed("+experiment=[quickstart,random_mask]", "+parallel=tp2")
    assert composed("+experiment=quickstart") == composed("experiment=quickstart")
    assert added == composed("experiment=[quickstart,random_mask]", "parallel=tp2")


# --- laws of the folder ---------------------------------------------------------------------------------------------


def test_groups_repeat_no_default() -> None:
    defaults = dict(leaves(to_container(Config())))
    for group, choices in GROUPS.items():
        for choice in choices:
            for key, value in leaves(read(group, choice)):
                assert value != defaults.get(key, ...), f"{group}/{choice}.yaml: {key}={value} is the schema's"


def test_the_default_of_a_group_changes_nothing() -> None:
    for group in GROUPS:
        assert not list(leaves(read(group, DEFAULTS[group])))
    assert parse(composed()) == Config()


def test_a_choice_on_the_command_line_is_never_overruled_by_an_experiment() -> None:
    """An experiment chooses for a group; the keys of the group's files do not stand in the experiment itself."""
    of_groups = {
        key: group for group, choices in GROUPS.items() for choice in choices for key, _ in leaves(read(group, choice))
    }
    for experiment in EXPERIMENTS:
        for key, _ in leaves(read("experiment", experiment)):
            assert key not in of_groups, f"experiment/{experiment}.yaml sets {key}, which is for {of_groups[key]}"
    quickstart = composed("experiment=quickstart", "precision=bf16", "trainer=one_node")
    assert (quickstart["trainer"]["precision"], quickstart["trainer"]["devices"]) == ("bf16", 8)


def test_the_papers_numbers_stand_in_its_experiments_alone() -> None:
    of_paper = {key for name in PAPER for key, _ in leaves(read("experiment", name))} - {"name"}
    shared = {"trainer.max_steps", "model.optim.sched.max_steps"}  # every recipe has its own length
    for experiment in set(EXPERIMENTS) - set(PAPER) - {"block_size_curriculum", "sft_baseline"}:
        assert not of_paper & {key for key, _ in leaves(read("experiment", experiment))} - shared


@pytest.mark.parametrize("experiment", PAPER)
def test_an_experiment_of_the_paper_names_table_hardware_and_result(experiment: str) -> None:
    text = (cli.CONF / "experiment" / f"{experiment}.yaml").read_text(encoding="utf-8")
    header = " ".join(line.removeprefix("# ") for line in text.partition("defaults:")[0].splitlines())
    assert re.search(r"[Tt]able", header) and "Hardware: one node of 8 GPUs" in header and "Expected" in header
    assert yaml.safe_load(text)["name"] == experiment


# --- what the files say, against the publications -------------------------------------------------------------------

#: The published recipe where it is not the schema: prompts x passes, in updates; support; longest response and its ramp.
RECIPES = {
    "paper_0_6b": ("qwen3_0_6b", 7728, 0, 4000, 100, False),
    "paper_1_7b": ("qwen3_1_7b", 7728, 0, 4000, 100, False),
    "paper_4b": ("qwen3_4b", 7728, 16, 4000, 100, False),
    "paper_8b": ("qwen3_8b", 7728, 16, 4000, 100, False),
    "paper_math_4b": ("qwen3_4b", 10080, 0, 2000, 100, False),
    "paper_math_8b": ("qwen3_8b", 10080, 0, 2000, 100, False),
    "paper_math_4b_thinking": ("qwen3_4b", 10080, 0, 8000, 200, True),
    "paper_math_8b_thinking": ("qwen3_8b", 10080, 0, 8000, 200, True),
}


@pytest.mark.parametrize("experiment", RECIPES)
def test_the_recipe_is_the_published_one(experiment: str) -> None:
    network, updates, top_k, longest, ramp, thinks = RECIPES[experiment]
    config = checked(composed(f"experiment={experiment}"))
    opdlm, schedule = config.model.opdlm, config.model.opdlm.rollout.max_new_tokens_schedule
    assert Architecture.from_keys(vars(config.model)) == Architecture.from_keys(read("model", network)["model"])
    assert (config.trainer.max_steps, config.model.optim.sched.max_steps) == (updates, updates + 1)
    assert (opdlm.divergence_top_k, opdlm.tail) == (top_k, "partial" if top_k else "tail_bucket")
    assert (schedule.type, schedule.start, schedule.end, schedule.ramp_steps) == ("cos", 100, longest, ramp)
    assert (config.trainer.devices, config.model.micro_batch_size, config.model.global_batch_size) == (8, 1, 8)
    assert opdlm.exclude_end_token and config.model.activations_checkpoint_granularity == "full"
    prompts = config.model.data.train_ds
    assert prompts.enable_thinking == thinks and prompts.domain_suffixes is not None
    assert (
        prompts.domain_suffixes["math"] == "\nPlease reason step by step, and put your final answer within \\boxed{}."
    )
    caps = {"math": 4096, "code": 2048, "chat": 2048, "science": 1024}
    assert opdlm.rollout.domain_caps == (None if "math" in experiment else caps)


#: As the families publish them, in billions: all parameters, and those outside the embeddings.
PUBLISHED = {
    "smollm2_135m": (0.1345, 0.106),
    "qwen2_5_0_5b": (0.494, 0.358),
    "qwen3_0_6b": (0.596, 0.44),
    "qwen3_1_7b": (1.72, 1.41),
    "qwen3_4b": (4.02, 3.63),
    "qwen3_8b": (8.19, 6.95),
    "llama3_8b": (8.03, 6.98),
    "llama3_1_8b": (8.03, 6.98),
}


def test_every_network_is_counted_but_the_quickstarts() -> None:
    assert set(GROUPS["model"]) - set(PUBLISHED) == {"from_checkpoint", "tiny"}


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_network_has_the_published_number_of_parameters(model: str) -> None:
    from nemo_opdlm.config import ModelConfig
    from nemo_opdlm.models.memory_sizes import NetworkSizes

    arch = Architecture.from_keys(read("model", model)["model"])
    assert arch is not None
    counted = NetworkSizes(arch, ModelConfig(), stage=0, weight_bytes=2, value_bytes=2, on_gpu=True).parameters
    embeddings = (1 if arch.share_embeddings_and_output_weights else 2) * arch.vocab_size * arch.hidden_size
    total, outside = PUBLISHED[model]
    assert (counted, counted - embeddings) == (
        pytest.approx(total * 1e9, rel=0.01),
        pytest.approx(outside * 1e9, rel=0.01),
    )


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A user's folder of configurations."""
    files = {
        "experiment/mine": "# @package _global_\ndefaults:\n  - paper_4b\n  - override /data: ours\nname: mine\n",
        "experiment/typo": "# @package _global_\nmodel: {opdlm: {blok_size: 3}}\n",
        "experiment/no_package": "model: {opdlm: {block_size: 8}}\n",
        "experiment/no_base": "# @package _global_\ndefaults: [papre_4b]\n",
        "experiment/no_choice": "# @package _global_\ndefaults: [override /parallel: tp3]\n",
        "experiment/no_group": "# @package _global_\ndefaults: [override /paralel: tp2]\n",
        "data/ours": "# @package model.data\ntrain_ds:\n  file_path: x.jsonl\n",
        "primary": "defaults:\n  - gpt_opdlm\n  - override /experiment: paper_4b\n  - _self_\nname: primary\n",
    }
    for name, text in files.items():
        file = tmp_path / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Config:
    """The configuration that a command line gives, without a process of its own."""
    found: list[Config] = []

    def task(config: Config) -> None:
        found.append(config)

    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # what a refused composition leaves behind, as its process ends
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    cli.main("gpt_opdlm", check=lambda config: validate(config, check_files=False))(task)()
    return found[0]


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("parallel=tp3", "parallel='tp3' must be one of 'cp2', 'cp4', 'dp'"),
        ("opdlm/divergence=forward", "'reverse_kl'; did you mean 'forward_kl'?"),
        ("parallel=null", "parallel=None must be one of 'cp2'"),
        ("paralel=tp2", "paralel is not a key of this configuration; did you mean parallel?"),
        ("model.parallel=tp2", "model.parallel is not a key of this configuration; did you mean parallel?"),
        ("cluster=slurm", "cluster is a group of examples/launch.py, which starts runs elsewhere"),
        ("+cluster=slurm", "cluster is a group of examples/launch.py, which starts runs elsewhere"),
        ("cluster.account=x", "which starts runs elsewhere: here, leave cluster.account out"),
        ("parallel=tp2", "must be a multiple of model.tensor_model_parallel_size=2"),
        ("experiment=[quickstart,nothing]", "experiment='nothing' must be one of 'block_size_curriculum'"),
        ("experiment=[sft_baseline,paper_4b]", "divergence_top_k=16 contradicts divergence='nll'"),
        (
            "experiment=typo",
            "model.opdlm.blok_size is not a key of this configuration; did you mean model.opdlm.block_size?",
        ),
        (
            "experiment=no_package",
            "experiment is a group of configurations, not a key: its files start with a line `# @package",
        ),
        ("experiment=no_base", "experiment/no_base.yaml: experiment='papre_4b' must be one of"),
        ("experiment=no_choice", "parallel='tp3' must be one of 'cp2'"),
        (
            "experiment=no_group",
            "experiment/no_group.yaml: paralel is not a key of this configuration; did you mean parallel?",
        ),
    ],
)
def test_a_mistake_in_a_group_is_one_line(
    own: Path, argument: str, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "--config-dir", str(own), "trainer.max_steps=400", argument)
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and message.count("\n") == 1 and expected in message


def test_users_have_experiments_groups_and_files_of_their_own(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = run(monkeypatch, "--config-dir", str(own), "experiment=mine", "parallel=tp2")
    assert (mine.name, mine.model.tensor_model_parallel_size, mine.model.opdlm.divergence_top_k) == ("mine", 2, 16)
    assert mine.model.data.train_ds.file_path == "x.jsonl" and mine.model.data.train_ds.domain_suffixes is None
    monkeypatch.chdir(own.parent)
    file = ("--config-path", own.name, "--config-name", "primary")
    assert run(monkeypatch, *file, "precision=fp8").model.fp8
    assert run(monkeypatch, *file, "experiment=quickstart").name == "primary"


def test_what_the_readme_shows_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```(\w*)\n(.*?)```", (cli.CONF / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    commands, mine = (next(text for kind, text in blocks if kind == wanted) for wanted in ("", "yaml"))
    for command in commands.replace("\\\n", " ").splitlines():
        python, script, *arguments = shlex.split(command, comments=True)
        assert python == "python" and (cli.CONF.parent / script).is_file()
        if "--cfg" not in arguments:
            assert run(monkeypatch, *arguments).model.tensor_model_parallel_size == 2
    for name, text in (
        ("experiment/mine", mine),
        ("data/ours", "# @package model.data\ntrain_ds: {file_path: x.jsonl}\n"),
    ):
        file = tmp_path / f"{name}.yaml"
        file.parent.mkdir()
        file.write_text(text, encoding="utf-8")
    found = run(monkeypatch, "--config-dir", str(tmp_path), "experiment=mine")
    assert (found.name, found.model.opdlm.states_per_rollout, found.model.opdlm.divergence_top_k) == ("mine", 2, 16)


def test_the_readme_lists_the_groups_with_their_defaults() -> None:
    rows = re.findall(
        r"^\| `([\w/]+)` \|.*\| (\S+) \|$", (cli.CONF / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert {group: default.strip("`") for group, default in rows} == DEFAULTS | {"experiment": "none"}


def test_help_shows_commands_and_every_choice() -> None:
    # A process of its own: NeMo, imported by other tests, has choices for groups of these names.
    script = cli.CONF.parent / "examples" / "train_opdlm.py"
    environment = os.environ | {"PYTHONPATH": str(cli.CONF.parent)}
    done = subprocess.run(
        [sys.executable, str(script), "--help"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and len(done.stdout.splitlines()) < 60
    for group, choices in {**GROUPS, "experiment": EXPERIMENTS}.items():
        assert f"\n{group}: {', '.join(choices)}\n" in done.stdout
    commands = ("model.restore_from_path=", "--cfg job", "nemo_opdlm/config/schema.py", "--config-dir")
    assert all(text in done.stdout for text in commands)
