"""The configuration of examples/generate.py."""

from pathlib import Path

import pytest

from nemo_opdlm import cli
from nemo_opdlm.config import parse
from nemo_opdlm.config.generate import GenerateConfig, validate_generate


@pytest.fixture
def archive(tmp_path: Path) -> str:
    path = tmp_path / "model.nemo"
    path.touch()
    return f"model.restore_from_path={path}"


def checked(*overrides: str) -> GenerateConfig:
    return validate_generate(parse(cli.compose("generate", overrides, GenerateConfig), GenerateConfig))


def test_prompts_on_the_command_line_keep_their_commas_and_quotes(archive: str) -> None:
    config = checked(archive, """prompts=["Alice, was", 'a "b"']""", "mode=static", "denoising_steps=2", "block_size=8")
    assert config.prompts == ("Alice, was", 'a "b"')
    assert (config.mode, config.denoising_steps, config.block_size) == ("static", 2, 8)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "one of prompts and prompts_file, found neither"),
        (["prompts=[x]", "prompts_file=x.jsonl"], "one of prompts and prompts_file, found both"),
        (["prompts=[]"], "prompts=[] holds no prompt"),
        (["prompts=[x,' ']"], "prompts[1] is empty"),
        (["prompts=x"], "prompts='x' must be a list of text"),
        (["prompts=[3]"], "prompts=[3] must be a list of text"),
        (["prompts_file=/no/such.jsonl"], "prompts_file='/no/such.jsonl' does not exist"),
        (["prompts=[x]", "model.restore_from_path=null"], "model.restore_from_path=None must be given"),
        (["prompts=[x]", "model.restore_from_path=/no/such.nemo"], "='/no/such.nemo' does not exist"),
        (["prompts=[x]", "mode=fast"], "mode='fast' must be one of"),
        (["prompts=[x]", "threshold=0"], "threshold=0.0 must be above 0"),
        (["prompts=[x]", "block_size=0"], "block_size=0 must be from 1 to 64"),
        (["prompts=[x]", "block_size=4", "denoising_steps=5"], "denoising_steps=5 must be from 1 to block_size=4"),
        (["prompts=[x]", "denoising_steps=0"], "denoising_steps=0 must be at least 1"),
        (["prompts=[x]", "max_new_tokens=0"], "max_new_tokens=0 must be at least 1"),
        (["prompts=[x]", "temperature=-1"], "temperature=-1.0 must be at least 0"),
        (["prompts=[x]", "top_p=0"], "top_p=0.0 must be above 0"),
        (["prompts=[x]", "top_k=-1"], "top_k=-1 must be at least 0"),
        (["prompts=[x]", "seed=-1"], "seed=-1 must be from 0"),
        (["prompts=[x]", "batch_size=0"], "batch_size=0 must be at least 1"),
        (["prompts=[x]", "chat_template=maybe"], "chat_template='maybe' must be true or false or 'auto'"),
        (["prompts=[x]", "+prompt=y"], "prompt is not a key of this configuration; did you mean prompts?"),
    ],
)
def test_mistakes_are_one_line_and_found_before_anything_is_loaded(
    archive: str, overrides: list[str], message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError)) as refusal:
        checked(archive, *overrides)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
