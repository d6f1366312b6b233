"""Whole folders: transformers -> Megatron names -> transformers is bit-exact; every input error is one clear line."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_opdlm.convert.families import megatron_shapes
from nemo_opdlm.convert.hugging_face import HfImport, HfOrigin, hf_to_megatron, megatron_to_hf


def export(model: HfImport, output: Path, **options: Any) -> Path:
    megatron_to_hf(model.state_dict, model.architecture, model.origin, model.tokenizer_files, output, **options)
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def test_the_round_trip_of_every_family_is_bit_exact(any_folder: Path, tmp_path: Path) -> None:
    model = hf_to_megatron(any_folder)
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict.items()}
    assert found == megatron_shapes(model.origin.family, model.architecture)
    assert_same_weights(weights(any_folder), weights(export(model, tmp_path / "back")))


def test_transformers_computes_the_same_logits_from_the_exported_folder(any_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    token_ids = torch.arange(20)[None] % 40
    exported = export(hf_to_megatron(any_folder), tmp_path / "back")
    before, after = (AutoModelForCausalLM.from_pretrained(path)(token_ids).logits for path in (any_folder, exported))
    assert torch.equal(before, after)


def test_bf16_stays_bf16_unless_another_type_is_asked_for(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_folder("qwen3-tied", dtype=torch.bfloat16)
    model = hf_to_megatron(source)
    assert model.origin.dtype == "bfloat16"
    assert_same_weights(weights(source), weights(export(model, tmp_path / "back")))
    assert json.loads((tmp_path / "back" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    wide = hf_to_megatron(source, dtype=torch.float32)
    assert {tensor.dtype for tensor in wide.state_dict.values()} == {torch.float32}
    narrow = export(wide, tmp_path / "narrow", dtype=torch.bfloat16)
    assert_same_weights(weights(source), weights(narrow))


def test_mixed_types_become_the_widest(tiny_folder: Callable[..., Path]) -> None:
    source = tiny_folder(dtype=torch.bfloat16)
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, source / "model.safetensors")
    model = hf_to_megatron(source)
    assert model.origin.dtype == "float32"
    assert {tensor.dtype for tensor in model.state_dict.values()} == {torch.float32}


def test_a_sharded_export_holds_the_same_weights(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    model = hf_to_megatron(tiny_folder("qwen2-untied"))
    whole, sharded = export(model, tmp_path / "one"), export(model, tmp_path / "many", max_shard_size=8000)
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert_same_weights(weights(whole), weights(sharded))
    again = hf_to_megatron(sharded)
    assert all(torch.equal(again.state_dict[name], tensor) for name, tensor in model.state_dict.items())


def test_an_added_mask_row_is_the_mean_and_is_stripped_again(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    source = tiny_folder("llama-untied-wide-heads", words=48)
    model = hf_to_megatron(source)
    assert (model.architecture.vocab_size, model.origin.mask_token_id, model.origin.added_rows) == (49, 48, 1)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        table = model.state_dict[name]
        assert table.shape[0] == 49
        torch.testing.assert_close(table[48], table[:48].mean(0))
    back = export(model, tmp_path / "back")
    assert_same_weights(weights(source), weights(back))
    assert json.loads((back / "config.json").read_text())["vocab_size"] == 48
    assert b"<|MASK|>" not in (back / "tokenizer.json").read_bytes()


def test_a_free_row_keeps_its_values(tiny_folder: Callable[..., Path]) -> None:
    source = tiny_folder(words=40)
    model = hf_to_megatron(source)
    assert (model.origin.mask_token_id, model.origin.added_rows) == (40, 0)
    embedding = model.state_dict["embedding.word_embeddings.weight"]
    assert torch.equal(embedding, load_file(source / "model.safetensors")["model.embed_tokens.weight"])


def test_missing_feed_forward_biases_are_zero_and_leave_no_trace(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_folder("llama-attention-bias")
    model = hf_to_megatron(source)
    biases = {name for name in model.state_dict if ".mlp." in name and name.endswith("bias")}
    assert len(biases) == 4 and not any(model.state_dict[name].any() for name in biases)
    assert_same_weights(weights(source), weights(export(model, tmp_path / "back")))
    model.state_dict["decoder.layers.1.mlp.linear_fc2.bias"] += 1
    trained = export(model, tmp_path / "trained")
    assert json.loads((trained / "config.json").read_text())["mlp_bias"] is True
    assert weights(trained)["model.layers.1.mlp.down_proj.bias"].eq(1).all()


def test_settings_of_the_source_survive(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import AutoConfig

    scaling = {"rope_type": "linear", "factor": 2.0, "rope_theta": 50000.0}
    source = tiny_folder("qwen3-tied", rope_parameters=scaling)
    (source / "generation_config.json").write_text('{"temperature": 0.6, "eos_token_id": [1, 3]}')
    before = AutoConfig.from_pretrained(source)
    back = export(hf_to_megatron(source), tmp_path / "back")
    after = AutoConfig.from_pretrained(back)
    ours = json.loads((back / "config.json").read_text())
    assert ours["rope_theta"] == 50000.0 and ours["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    assert after.rope_parameters == before.rope_parameters
    different = {key for key in before.to_dict() if before.to_dict()[key] != after.to_dict().get(key)}
    assert different <= {"_name_or_path", "transformers_version"}
    assert json.loads((back / "generation_config.json").read_text()) == {"temperature": 0.6, "eos_token_id": [1, 3]}


def test_an_origin_survives_a_yaml_file(tiny_folder: Callable[..., Path]) -> None:
    from omegaconf import OmegaConf

    origin = hf_to_megatron(tiny_folder("qwen2-tied")).origin
    stored = OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(OmegaConf.create(origin.as_dict()))))
    assert HfOrigin(**stored) == origin


def damage_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("llama-tied", lambda w: w.pop(UP), rf"tensor {UP} of shape \[24, 32\] is missing"),
        ("llama-tied", lambda w: w.update({UP: torch.zeros(25, 32)}), rf"{UP} has shape \[25, 32\], the config says"),
        ("llama-tied", lambda w: w.update(extra=torch.zeros(1)), "unexpected tensor extra"),
        ("llama-tied", lambda w: w.update({"lm_head.weight": torch.zeros(48, 32)}), "lm_head.weight differs from"),
        ("qwen2-untied", lambda w: w.pop("lm_head.weight"), "tensor lm_head.weight .* is missing"),
        ("llama-all-biases", lambda w: w.pop("model.layers.0.mlp.up_proj.bias"), "mlp.up_proj.bias .* is missing"),
        ("llama-tied", lambda w: w.update({UP: torch.zeros(24, 32, dtype=torch.int8)}), f"{UP} has type I8; allowed"),
    ],
    ids=["missing", "shape", "unexpected", "head-differs", "head-missing", "bias-missing", "integers"],
)
def test_wrong_weights_are_refused(
    tiny_folder: Callable[..., Path], case: str, change: Callable[[dict[str, torch.Tensor]], Any], message: str
) -> None:
    folder = tiny_folder(case)
    damage_weights(folder, change)
    with pytest.raises(ValueError, match=message):
        hf_to_megatron(folder)


def test_a_tied_models_head_that_equals_the_embedding_is_dropped(tiny_folder: Callable[..., Path]) -> None:
    folder = tiny_folder("llama-tied")
    damage_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    model = hf_to_megatron(folder)
    assert model.architecture.share_embeddings_and_output_weights and "output_layer.weight" not in model.state_dict


def test_an_untied_head_that_equals_the_embedding_stays(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = tiny_folder("qwen3-untied")
    damage_weights(folder, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"].clone()}))
    assert_same_weights(weights(folder), weights(export(hf_to_megatron(folder), tmp_path / "back")))


def test_a_config_error_names_the_file(tiny_folder: Callable[..., Path], change_json: Callable[..., None]) -> None:
    folder = tiny_folder()
    change_json(folder / "config.json", architectures=["MixtralForCausalLM"])
    with pytest.raises(ValueError, match=r"source/config.json: architectures=\['MixtralForCausalLM'\]"):
        hf_to_megatron(folder)


def test_export_refuses_weights_of_another_shape(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    model = hf_to_megatron(tiny_folder())
    model.state_dict["embedding.word_embeddings.weight"] = torch.zeros(50, 32)
    with pytest.raises(ValueError, match=r"embedding.word_embeddings.weight has shape \[50, 32\]"):
        export(model, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_conversion_imports_neither_transformers_nor_nemo_nor_megatron() -> None:
    modules = "hugging_face, sdar, sources"
    code = f"import sys; from nemo_opdlm.convert import {modules}; print(sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not any(f"'{name}'" in loaded for name in ("transformers", "nemo", "megatron", "gguf", "tokenizers"))
