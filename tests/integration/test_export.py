"""What the exported folders are good for: engines write from them what our sampler writes, and they come back bit by bit."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from nemo_opdlm.config.generate import GenerateConfig
from nemo_opdlm.evaluation.generation import Generator
from nemo_opdlm.models.archive_format import read_archive_config
from nemo_opdlm.testing import tiny
from tests.integration.plain_transformers import decode
from tests.integration.training_runs import run_script

VOCAB_SIZE, MASK_ID, BLOCK_SIZE, NUM_NEW = 151936, 151669, 8, 64
END_TOKENS = {"eos_token_id": [1], "bos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class Exports:
    """A Qwen3 model of the true vocabulary, as archive, as both exports, and as the archives made of these again."""

    source: Path
    archive: Path
    folders: dict[str, Path]
    again: dict[str, Path]


@pytest.fixture(scope="module", params=["untied", "tied"])
def exports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    folder = tmp_path_factory.mktemp(request.param)
    source = tiny.write_hf_folder(
        folder / "source", "qwen3", vocab_size=VOCAB_SIZE, tie_word_embeddings=request.param == "tied", hidden_size=16
    )
    for name, content in tiny.tokenizer_files(MASK_ID).items():  # a full table, as Qwen3's: only the last rows are free
        (source / name).write_bytes(content)
    (source / "generation_config.json").write_text(json.dumps(END_TOKENS))
    _shape_weights(source)
    archive = folder / "model.nemo"
    _convert("convert_hf_to_nemo.py", source, archive, "--block_size", str(BLOCK_SIZE))
    folders = {name: folder / name for name in ("hf", "sdar")}
    again = {name: folder / f"{name}.nemo" for name in folders}
    for name, path in folders.items():
        _convert("convert_nemo_to_hf.py", archive, path, "--format", name)
        _convert("convert_hf_to_nemo.py", path, again[name])
    return Exports(source, archive, folders, again)


def _shape_weights(source: Path) -> None:
    """Unused rows are never the most likely ones, as in a trained model; and layers matter, so that the text has no rut.

    Our sampler forbids those rows, engines do not.
    """
    (file,) = source.glob("*.safetensors")
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor[MASK_ID + 1 :] = 0
        elif name.endswith("_proj.weight"):
            tensor *= 4
        elif name == "model.norm.weight":
            tensor *= 20  # so that some tokens are sure, some are not
    save_file(tensors, file, {"format": "pt"})


def _convert(script: str, source: Path, output: Path, *options: str) -> None:
    flag = "--output_path" if script == "convert_hf_to_nemo.py" else "--hf_output_path"
    assert run_script(script, "--input_name_or_path", str(source), flag, str(output), *options) == 0


@pytest.fixture(scope="module")
def generator(exports: Exports) -> Generator:
    return Generator.load(exports.archive)


def _engine_model(folder: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Qwen3 with the weights of an SDAR folder, and its config.json, read flat as the engines do."""
    config = json.loads((folder / "config.json").read_text())
    wanted = Qwen3Config().to_dict().keys() & config.keys()
    shape = {key: config[key] for key in wanted if key not in ("architectures", "model_type", "auto_map")}
    rope = {"rope_type": "default", "rope_theta": config["rope_theta"]}
    model = Qwen3ForCausalLM(Qwen3Config(**{**shape, "rope_parameters": rope, "dtype": "float32"}))
    weights = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    model.load_state_dict(weights, strict=True)
    return model.eval(), config


@pytest.mark.parametrize(("prompt_len", "threshold"), [(8, 1.0), (13, 0.6), (3, 0.6)])
def test_plain_qwen3_with_a_block_mask_writes_what_our_sampler_writes(
    exports: Exports, generator: Generator, prompt_len: int, threshold: float
) -> None:
    model, config = _engine_model(exports.folders["sdar"])
    prompt = torch.randint(4, MASK_ID, (prompt_len,), generator=torch.Generator().manual_seed(prompt_len))
    settings = GenerateConfig(mode="dynamic", threshold=threshold, max_new_tokens=NUM_NEW)
    trajectory = generator.generate([prompt], settings)
    assert trajectory.response_len.tolist() == [NUM_NEW] and trajectory.block_size == config["block_size"] == BLOCK_SIZE
    ours = trajectory.token_ids[0, prompt_len : prompt_len + NUM_NEW]
    theirs = decode(model, prompt, config["block_size"], config["mask_token_id"], NUM_NEW, threshold)
    assert torch.equal(ours, theirs)
    assert ours.unique().numel() > 10  # else there would be little to reproduce
    if threshold < 1:  # neither whole blocks nor single tokens only, the rest of the last block included
        assert NUM_NEW // BLOCK_SIZE + 1 < int(trajectory.num_forwards) < int(trajectory.row_end) - prompt_len


def test_transformers_writes_from_left_to_right_what_we_write(exports: Exports, generator: Generator) -> None:
    folder = exports.folders["hf"]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("w7 w70 w700 w7000", return_tensors="pt")
    assert prompt.input_ids.tolist() == [[7, 70, 700, 7000]]
    expected = model.generate(**prompt, max_new_tokens=NUM_NEW, do_sample=False)[0, 4:]
    settings = GenerateConfig(mode="autoregressive", max_new_tokens=NUM_NEW)
    trajectory = generator.generate([prompt.input_ids[0]], settings)
    assert trajectory.token_ids[0, 4 : 4 + NUM_NEW].tolist() == expected.tolist()


@pytest.mark.parametrize("name", ["hf", "sdar"])
def test_both_formats_come_back_bit_by_bit(exports: Exports, generator: Generator, name: str) -> None:
    again = Generator.load(exports.again[name])
    assert again.network.arch == generator.network.arch
    expected = dict(generator.network.named_parameters())
    found = dict(again.network.named_parameters())
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert tensor.dtype == expected[key].dtype and torch.equal(tensor, expected[key]), key
    for key in ("opdlm", "precision"):
        assert read_archive_config(exports.again[name])[key] == read_archive_config(exports.archive)[key]
    assert again.tokenizer.get_vocab() == generator.tokenizer.get_vocab()
    assert again.tokenizer.mask_token_id == MASK_ID


def test_what_a_server_needs_lies_beside_the_weights(exports: Exports) -> None:
    sdar, hf = exports.folders["sdar"], exports.folders["hf"]
    for folder in (sdar, hf):
        assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= {
            path.name for path in folder.iterdir()
        }
    assert json.loads((hf / "generation_config.json").read_text()) == END_TOKENS
    assert (sdar / "dllm_algorithm.yaml").read_text() == f"threshold: 0.9\nblock_size: {BLOCK_SIZE}\n"
    serving = (sdar / "SERVING.md").read_text()
    assert "sglang.launch_server --model-path . " in serving and f"--dllm-block-length {BLOCK_SIZE}" in serving


def test_a_folder_without_the_added_mask_row_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tiny.write_hf_folder(tmp_path / "source", vocab_size=tiny.NUM_TOKENS)
    _convert("convert_hf_to_nemo.py", source, tmp_path / "model.nemo")
    _convert("convert_nemo_to_hf.py", tmp_path / "model.nemo", tmp_path / "hf")
    assert "The row of <|MASK|>, which the conversion had added, is not in it" in capsys.readouterr().out
