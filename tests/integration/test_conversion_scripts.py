"""The two converters as users call them: a folder that went through a `.nemo` archive is the folder it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from nemo_opdlm.models.archive_format import read_archive_config
from nemo_opdlm.models.opdlm_model import OPDLMModel
from nemo_opdlm.testing import tiny
from tests.integration.training_runs import TINY, run, run_script, tiny_inputs

_TOKENS_WITHOUT_A_FREE_ROW = {"vocab_size": tiny.NUM_TOKENS}


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_weights(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def there_and_back(source: Path, folder: Path, *arguments: str) -> Path:
    """Both scripts in turn; returns the exported folder."""
    archive, back = folder / "model.nemo", folder / "back"
    there = ("--input_name_or_path", str(source), "--output_path", str(archive))
    assert run_script("convert_hf_to_nemo.py", *there, *arguments) == 0
    back_again = ("--input_name_or_path", str(archive), "--hf_output_path", str(back))
    assert run_script("convert_nemo_to_hf.py", *back_again) == 0
    return back


@pytest.mark.parametrize("changes", [{}, _TOKENS_WITHOUT_A_FREE_ROW], ids=["free-row", "added-row"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family_comes_back_bit_for_bit(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    source = tiny.write_hf_folder(tmp_path / "source", family, **changes)
    back = there_and_back(source, tmp_path)
    assert_same_weights(weights(source), weights(back))
    config, original = (json.loads((folder / "config.json").read_text()) for folder in (back, source))
    assert config["vocab_size"] == original["vocab_size"] and config["architectures"] == original["architectures"]


def test_bf16_weights_stay_bf16_or_become_what_is_asked_for(tmp_path: Path) -> None:
    source = tiny.write_hf_folder(tmp_path / "source", dtype="bfloat16")
    rounded = {name: tensor.bfloat16() for name, tensor in weights(source).items()}
    assert_same_weights(rounded, weights(there_and_back(source, tmp_path, "--precision", "bf16")))
    (tmp_path / "wide").mkdir()
    wide = weights(there_and_back(source, tmp_path / "wide", "--precision", "32"))
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}


def test_a_trained_student_is_exported_with_the_weights_it_has(tmp_path: Path) -> None:
    model = run(tmp_path / "log", *TINY, *tiny_inputs(tmp_path))
    model.save_to(str(tmp_path / "student.nemo"))
    there = ("--input_name_or_path", str(tmp_path / "student.nemo"), "--hf_output_path", str(tmp_path / "hf"))
    assert run_script("convert_nemo_to_hf.py", *there) == 0
    exported = weights(tmp_path / "hf")
    assert torch.equal(exported["model.embed_tokens.weight"], model.model.head_weight()[: tiny.VOCAB_SIZE])
    back = ("--input_name_or_path", str(tmp_path / "hf"), "--output_path", str(tmp_path / "again.nemo"))
    assert run_script("convert_hf_to_nemo.py", *back) == 0
    again = dict(OPDLMModel.restore_from(str(tmp_path / "again.nemo")).model.named_parameters())
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.model.named_parameters())


def test_an_export_for_serving_engines_is_accepted_as_input(tmp_path: Path) -> None:
    # The engines hard-code Qwen3's unused row as mask token.
    source = tiny.write_hf_folder(tmp_path / "source", "qwen3-tied-wide-heads", vocab_size=151936, hidden_size=8)
    archive, sdar, again = (str(tmp_path / name) for name in ("model.nemo", "sdar", "again.nemo"))
    size = ("--block_size", "8")
    there = ("--input_name_or_path", str(source), "--output_path", archive, *size)
    assert run_script("convert_hf_to_nemo.py", *there) == 0
    served = ("--input_name_or_path", archive, "--hf_output_path", sdar, "--format", "sdar")
    assert run_script("convert_nemo_to_hf.py", *served) == 0
    assert run_script("convert_hf_to_nemo.py", "--input_name_or_path", sdar, "--output_path", again) == 0
    assert read_archive_config(again)["opdlm"] == {"block_size": 8, "mask_token_id": 151669}
    back = ("--input_name_or_path", again, "--hf_output_path", str(tmp_path / "back"))
    assert run_script("convert_nemo_to_hf.py", *back) == 0
    assert_same_weights(weights(source), weights(tmp_path / "back"))
