"""Documentation says what the code says."""

import re

import pytest

from nemo_opdlm import cli
from nemo_opdlm.config import Config, parse
from nemo_opdlm.config.evaluate import EvaluateConfig
from nemo_opdlm.config.foreign import RENAMED
from nemo_opdlm.config.generate import GenerateConfig
from nemo_opdlm.config.launch import LaunchConfig
from tests.documented import REPOSITORY, Command, commands

DOCS = REPOSITORY / "docs"


def rows(page: str) -> list[list[str]]:
    """Cells of a page's tables, without their headings."""
    lines = (DOCS / page).read_text(encoding="utf-8").splitlines()
    return [line.strip("|").split(" | ") for line in lines if line.startswith("| ")]


def source() -> str:
    """Every text of the package, with literals that go on in the next line joined."""
    text = "\n".join(file.read_text(encoding="utf-8") for file in sorted((REPOSITORY / "nemo_opdlm").rglob("*.py")))
    return re.sub(r'"\s*\n\s*f?"', "", text)


def test_foreign_keys_are_documented_as_they_are_answered() -> None:
    keys = {cells[0].strip(" `"): cells[1].strip(" `") for cells in rows("coming_from.md")}
    # Those of Megatron-Bridge and of NeMo stand in the sections of their own.
    elsewhere = ("recompute_", "trainer.opdlm", "save_interval")
    expected = {key: ours for key, ours in RENAMED.items() if not key.startswith(elsewhere)}
    assert {key: keys.get(key) for key in expected} == expected


@pytest.mark.parametrize("message", [cells[0].strip() for cells in rows("troubleshooting.md") if "`" in cells[0]])
def test_messages_are_those_of_the_code(message: str) -> None:
    text = source()
    for part in message.strip("` ").split("…"):
        # What is printed differs from its literal where values stand.
        assert part.strip(" ;:") in text, part


#: Scripts that Hydra composes a configuration for: its file and its schema.
COMPOSED = {
    "train_opdlm": ("gpt_opdlm", Config),
    "plan": ("gpt_opdlm", Config),
    "launch": ("gpt_opdlm", LaunchConfig),
    "generate": ("generate", GenerateConfig),
    "evaluate": ("evaluate", EvaluateConfig),
}


@pytest.mark.parametrize("command", [command for command in commands() if command.script], ids=str)
def test_commands_name_scripts_keys_and_flags_that_are_there(command: Command) -> None:
    script, arguments = str(command.script), command.arguments
    text = (REPOSITORY / "examples" / f"{script}.py").read_text(encoding="utf-8")
    if script not in COMPOSED:
        assert all(flag in text for flag in arguments if flag.startswith("--"))
        return
    # Of a sweep the first run; what is not `key=value` are options of Hydra.
    is_sweep = "-m" in arguments
    overrides = [part for part in arguments if "=" in part]
    if is_sweep:
        overrides = [part.partition(",")[0] for part in overrides]
    name, schema = COMPOSED[script]
    parse(cli.compose(name, overrides, schema=schema), schema)
