"""Tiny Hugging Face folders as transformers writes them, with random weights and a tokenizer of a few tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

VOCABULARY = 48
SPECIALS = ("<pad>", "<eos>", "<bos>", "<unused>")

CASES: dict[str, dict[str, Any]] = {
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-untied-wide-heads": {"model_type": "llama", "head_dim": 16},
    "llama-attention-bias": {"model_type": "llama", "attention_bias": True},
    "llama-all-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-multi-head": {"model_type": "llama", "num_key_value_heads": 4},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-untied": {"model_type": "qwen2", "num_key_value_heads": 1},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3-untied": {"model_type": "qwen3", "head_dim": 8},
}
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
}


def tokenizer_files(words: int = 40, **config: Any) -> dict[str, bytes]:
    """A word-level tokenizer: four specials, then `w4`, `w5` ... up to `words` entries."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokens = [*SPECIALS, *(f"w{id}" for id in range(len(SPECIALS), words))]
    tokenizer = Tokenizer(models.WordLevel({token: id for id, token in enumerate(tokens)}, unk_token="w4"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        **config,
    }
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}


def write_tiny_folder(folder: Path, dtype: torch.dtype = torch.float32, words: int = 40, **config: Any) -> Path:
    """Write a random model with `save_pretrained`; norms and biases are random too, as zeros would hide mistakes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = {**SHAPE, **config}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    for name, content in tokenizer_files(words).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="session", params=CASES, ids=list(CASES))
def any_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of every kind."""
    return write_tiny_folder(tmp_path_factory.mktemp(request.param), **CASES[request.param])


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of one's own: `tiny_folder("qwen3-tied", vocab_size=40)`."""

    def make(case: str = "llama-tied", **config: Any) -> Path:
        return write_tiny_folder(tmp_path / "source", **{**CASES[case], **config})

    return make


@pytest.fixture
def make_tokenizer_files() -> Callable[..., dict[str, bytes]]:
    """`tokenizer_files`, for tests."""
    return tokenizer_files


def edit_json(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.fixture
def change_json() -> Callable[..., None]:
    """`edit_json`, for tests."""
    return edit_json
