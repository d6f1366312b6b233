"""Configurations, as mappings and on the command line."""

import contextlib
import copy
import io
import json
import os
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from nemo_opdlm import cli
from nemo_opdlm.config import Config, full_keys, parse, validate
from nemo_opdlm.config.generate import GenerateConfig, validate_generate
from tests.fuzz import mutations, tokens
from tests.fuzz.engine import Case

_BASE: dict[str, Any] = {
    "trainer": {"max_steps": 1000, "accelerator": "cpu", "precision": 32},
    "model": {
        "restore_from_path": "x.nemo",
        "data": {"train_ds": {"file_path": "x.jsonl", "domain_suffixes": {"math": "?"}}},
        "opdlm": {"block_size": 4, "rollout": {"domain_caps": {"math": 4}}},
        "optim": {"betas": [0.9, 0.95]},
    },
    "exp_manager": {"max_time_per_run": "00:01:00:00"},
}
_KEYS = (
    *full_keys(Config),
    "model.hidden_dropout",
    "model.opdlm.blocksize",
    "pretrained_checkpoint",
    "a.b",
    "",
    "model.",
    "..",
)
_FULL_BASE = {**_BASE, "pretrained_checkpoint": {"restore_from_path": "x.nemo"}}


@st.composite
def _settings(draw: DrawFn) -> Any:
    """Any keys of the schema, and others, with any values."""
    tree = copy.deepcopy(_BASE)
    for _ in range(draw(st.integers(1, 3))):
        *sections, name = draw(st.sampled_from(_KEYS)).split(".")
        place: Any = tree
        for section in sections:
            place = place.setdefault(section, {})
            if not isinstance(place, dict):
                break
        if isinstance(place, dict):
            place[name] = draw(mutations.values)
    return tree


def config_cases() -> SearchStrategy[Case]:
    """Settings as YAML texts, of a training run and of `generate.py`."""
    trees = (_settings() | mutations.edited_tree((_FULL_BASE,))).map(
        lambda tree: Case("train.json", mutations.dump(tree))
    )
    texts = mutations.edited_bytes(yaml.safe_dump(_FULL_BASE).encode(), tokens=tokens.YAML).map(
        lambda text: Case("train.yaml", text)
    )
    generate = mutations.edited_json(
        {"model": {"restore_from_path": "x.nemo"}, "prompts": ["a"], "block_size": 4, "top_p": 0.5}
    )
    return trees | trees | texts | generate.map(lambda content: Case("generate.json", content))


def read_config(case: Case) -> None:
    """As settings of a mapping are read; what is no YAML is not ours to judge."""
    try:
        settings = json.loads(case.content) if case.file.endswith(".json") else yaml.safe_load(case.content)
    except (ValueError, RecursionError, yaml.YAMLError, TypeError, AttributeError, KeyError):
        return
    if not isinstance(settings, dict):
        return
    if case.file.startswith("train"):
        validate(parse(settings), check_files=False, environment={})
    else:
        validate_generate(parse(settings, GenerateConfig))


def override_cases() -> SearchStrategy[Case]:
    """Arguments of a command line."""
    key = st.sampled_from(_KEYS) | st.text(
        st.characters(codec="utf-8", exclude_characters="\0\n"), min_size=1, max_size=8
    )
    value = mutations.leaves.map(str) | st.sampled_from(
        (
            "",
            "null",
            "[1,2]",
            "{a:1}",
            "${model.seed}",
            "${x}",
            "${oc.env:NO}",
            "${int_div:1,0}",
            "${",
            "'",
            '"',
            "1,2",
            "range(1,3)",
            "[" * 300,
        )
        + (
            "${sum:a,1}",
            "${multiply:${model.seed},2}",
            "choice(1)",
            "glob(*)",
            "\\",
            "a=b",
            "0x" + "f" * 5000,
            "1e5",
            "nan",
            "${trainer}",
            "${model}",
        )
    )
    sign = st.sampled_from(("", "", "", "+", "++", "~"))
    # A newline ends an argument in the kept file.
    override = st.tuples(sign, key, st.sampled_from(("=", "=", "=", "", "@x=", ":x=")), value).map(
        lambda parts: "".join(parts).replace("\n", " ")
    )
    known = st.sampled_from(
        ("+experiment=nothing", "+experiment=off_policy", "experiment=[a,b]", "hydra.job.name=x", "trainer.max_steps=5")
    )
    arguments = st.lists(override | known, min_size=1, max_size=3).filter(
        lambda found: not any(a.startswith(("-", "hydra")) for a in found)
    )
    return arguments.map(lambda found: Case("arguments", "\n".join(found).encode("utf-8", "surrogatepass")))


_GOOD_ARGUMENTS = (
    "trainer.max_steps=1000",
    f"model.restore_from_path={os.devnull}",
    f"model.data.train_ds.file_path={os.devnull}",
)


class CommandLine:
    """The command line of a script whose task does nothing."""

    def __init__(self) -> None:
        self.read_once = cli.main("gpt_opdlm")(_do_nothing)

    def read(self, case: Case) -> str | None:
        """Run it; a refusal is its line on stderr."""
        arguments = case.content.decode("utf-8", "surrogatepass").split("\n")
        stderr = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
            patch.setattr("sys.argv", ["fuzz", *_GOOD_ARGUMENTS, *arguments])
            patch.setattr("os.environ", {**os.environ, "HYDRA_FULL_ERROR": "0"})  # a command may change it
            try:
                self.read_once()
            except SystemExit as end:
                lines = [line for line in stderr.getvalue().splitlines() if "error: " in line]
                is_one_line = len(lines) == 1 and "Traceback" not in stderr.getvalue()
                assert end.code == 2 and is_one_line, stderr.getvalue()[-3000:]
                return lines[0]
        return None


def _do_nothing(config: Config) -> None:
    """Accept every configuration."""
