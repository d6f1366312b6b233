"""The SDAR folder: plain files that the serving engines read, weights that come back unchanged."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from nemo_opdlm.convert.hf_folder import load_hf_folder
from nemo_opdlm.convert.hugging_face import HfImport, hf_to_megatron
from nemo_opdlm.convert.sdar import check_is_sdar, megatron_to_sdar


@pytest.fixture
def qwen3(tiny_folder: Callable[..., Path]) -> HfImport:
    """A tiny tied model with Qwen3's vocabulary."""
    return hf_to_megatron(tiny_folder("qwen3-tied", vocab_size=151936, hidden_size=8, head_dim=4))


def export(model: HfImport, output: Path, block_size: int = 4) -> str:
    return megatron_to_sdar(
        model.state_dict, model.architecture, model.origin, model.tokenizer_files, output, block_size=block_size
    )


def test_config_is_plain_json_with_flat_rope_and_the_engines_constants(qwen3: HfImport, tmp_path: Path) -> None:
    export(qwen3, tmp_path / "sdar", block_size=8)
    config = json.loads((tmp_path / "sdar" / "config.json").read_text())
    expected = {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
        "block_size": 8,
        "mask_token_id": 151669,
        "vocab_size": 151936,
        "head_dim": 4,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 151643,
        "eos_token_id": 151643,
    }
    assert {key: config[key] for key in expected} == expected
    assert "rope_parameters" not in config


def test_side_files_say_how_to_decode(qwen3: HfImport, tmp_path: Path) -> None:
    export(qwen3, tmp_path / "sdar")
    assert OmegaConf.load(tmp_path / "sdar" / "dllm_algorithm.yaml") == {"threshold": 0.9, "block_size": 4}
    generation = json.loads((tmp_path / "sdar" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [151645, 151643]
    assert generation["pad_token_id"] == generation["bos_token_id"] == 151643
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        tokens = json.loads((tmp_path / "sdar" / name).read_text())
        assert tokens["mask_token"] == "<|MASK|>" and "<|MASK|>" in tokens["additional_special_tokens"]
    assert json.loads((tmp_path / "sdar" / "added_tokens.json").read_text())["<|MASK|>"] == 151669


def test_launch_lines_name_folder_and_block_size(qwen3: HfImport, tmp_path: Path) -> None:
    lines = export(qwen3, tmp_path / "sdar", block_size=8)
    assert f"--model-path {tmp_path / 'sdar'} " in lines
    assert "--dllm-block-length 8" in lines and "--dllm-denoising-steps 8" in lines
    assert "--dllm-confidence-threshold 0.9" in lines and "Block grid: absolute" in lines


def test_the_head_is_explicit_and_ties_again_on_import(qwen3: HfImport, tmp_path: Path) -> None:
    export(qwen3, tmp_path / "sdar")
    written = load_hf_folder(tmp_path / "sdar")
    assert torch.equal(written.tensor("lm_head.weight"), written.tensor("model.embed_tokens.weight"))
    again = hf_to_megatron(tmp_path / "sdar")
    assert again.architecture == qwen3.architecture
    assert (again.origin.mask_token_id, again.origin.mask_token, again.origin.block_size) == (151669, "<|MASK|>", 4)
    assert again.state_dict.keys() == qwen3.state_dict.keys()
    assert all(torch.equal(tensor, qwen3.state_dict[name]) for name, tensor in again.state_dict.items())


def test_transformers_loads_config_and_tokenizer(
    qwen3: HfImport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoTokenizer, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    export(qwen3, tmp_path / "sdar")
    config = AutoConfig.from_pretrained(tmp_path / "sdar", trust_remote_code=True)
    assert (config.model_type, config.rope_theta, config.block_size) == ("sdar", 50000.0, 4)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "sdar", trust_remote_code=True)
    assert tokenizer.mask_token_id == 151669


def test_other_families_are_refused_by_name(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--format sdar is for Qwen3 only, this model is 'llama'; use --format hf"):
        export(hf_to_megatron(tiny_folder("llama-tied")), tmp_path / "sdar")
    assert not (tmp_path / "sdar").exists()


def test_another_mask_token_is_refused(tiny_folder: Callable[..., Path]) -> None:
    model = hf_to_megatron(tiny_folder("qwen3-untied"))
    with pytest.raises(ValueError, match=r"needs mask_token_id=151669, .* this model has 40 \('<\|MASK\|>'\)"):
        check_is_sdar(model.architecture, model.origin)


def test_a_vocabulary_that_is_not_qwen3s_is_refused(tiny_folder: Callable[..., Path]) -> None:
    model = hf_to_megatron(tiny_folder("qwen3-untied"))
    with pytest.raises(ValueError, match="needs the Qwen3 vocabulary, this model has 48 rows"):
        check_is_sdar(model.architecture, replace(model.origin, mask_token_id=151669))
