"""Tiny models with random weights, as Hugging Face folders and Megatron networks: real code paths in milliseconds."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_opdlm.config import Architecture
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.megatron.optimizer import OptimizerSettings
from nemo_opdlm.megatron.parallel import ParallelContext
from nemo_opdlm.megatron.student import ModelOptions, StagedGPT, build_model

if TYPE_CHECKING:  # the tests on a GPU run without what the conversion needs
    from nemo_opdlm.convert.hugging_face import HfImport

#: Rows of the embedding; the tokenizer below has 40 entries, so the mask token becomes row 40.
VOCAB_SIZE = 48
NUM_TOKENS = 40
MASK_TOKEN_ID = 40
PAD_TOKEN_ID, END_TOKEN_ID = 0, 1
_SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unused>")

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "bos_token_id": 2,
    "eos_token_id": END_TOKEN_ID,
    "pad_token_id": PAD_TOKEN_ID,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

#: Name -> Hugging Face settings that differ from one supported model to the next.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-linear-rope": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
    "llama-llama3-rope": {"model_type": "llama", "head_dim": 16, "rope_parameters": _LLAMA3_ROPE},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "qwen2": {"model_type": "qwen2", "num_key_value_heads": 1},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
    "qwen3-tied-wide-heads": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
}


def tokenizer_files(num_tokens: int = NUM_TOKENS) -> dict[str, bytes]:
    """Files of a word-level tokenizer: four special tokens, then ``w4``, ``w5`` ... up to ``num_tokens`` entries."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    words = [*_SPECIAL_TOKENS, *(f"w{token}" for token in range(len(_SPECIAL_TOKENS), num_tokens))]
    tokenizer = Tokenizer(models.WordLevel({word: token for token, word in enumerate(words)}, unk_token="w4"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in _SPECIAL_TOKENS])
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "bos_token": "<bos>",
    }
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}


def write_hf_folder(folder: Path, family: str = "qwen3-tied-wide-heads", seed: int = 0, **changes: Any) -> Path:
    """Write a random model as transformers does; norms and biases are random too, as ones and zeros hide mistakes.

    Args:
        folder: created.
        family: a key of ``FAMILIES``.
        seed: of the weights.
        changes: further settings of the Hugging Face config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**_SHAPE, **FAMILIES[family], **changes}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    for name, content in tokenizer_files().items():
        (folder / name).write_bytes(content)
    return folder


def architecture(**changes: Any) -> Architecture:
    """A Qwen3-like network of two narrow layers."""
    shape = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 256,
        "qk_layernorm": True,
        "share_embeddings_and_output_weights": True,
        "init_method_std": 0.2,
        "make_vocab_size_divisible_by": 1,  # else no tensor-parallel rank but the first would have a token
    }
    return Architecture(**{**shape, **changes})


def optimizer_settings(**changes: Any) -> OptimizerSettings:
    """AdamW with steps that are large for a tiny network, without warm-up."""
    settings = {
        "lr": 1e-2,
        "min_lr": 1e-3,
        "weight_decay": 0.0,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "clip_grad": 1.0,
        "decoupled_weight_decay": True,
        "distributed": False,
        "decay_style": "cosine",
        "warmup_steps": 0,
        "decay_steps": 10,
    }
    return OptimizerSettings(**{**settings, **changes})


def random_network(
    arch: Architecture,
    parallel: ParallelContext,
    rule: AttentionRule = AttentionRule.BLOCK_DIFFUSION,
    options: ModelOptions = ModelOptions(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> StagedGPT:
    """A network with weights that depend on ``seed`` alone; its logits differ enough that no position is a toss-up."""
    torch.manual_seed(seed)
    network = build_model(arch, parallel, rule, options)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape).to(parameter) * 0.1)
    return network


def load_import(
    imported: "HfImport",
    parallel: ParallelContext,
    rule: AttentionRule,
    options: ModelOptions = ModelOptions(),  # noqa: B008 (frozen)
) -> StagedGPT:
    """The network of an imported Hugging Face folder."""
    network = build_model(imported.architecture, parallel, rule, options)
    fill(network, imported)
    return network


def fill(network: StagedGPT, imported: "HfImport") -> None:
    """Put imported weights into a network; rows that pad its vocabulary keep their random values."""
    from nemo_opdlm.convert.families import OUTPUT_LAYER, WORD_EMBEDDINGS

    own = network[0].state_dict()
    for name, value in imported.state_dict.items():
        true = own[name][: len(value)] if name in (WORD_EMBEDDINGS, OUTPUT_LAYER) else own[name]
        assert true.shape == value.shape, name
        true.copy_(value)
