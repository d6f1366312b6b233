"""The `glassllm` wheel (MIT): a really pretrained 0.85 M parameter Llama-style model of Lewis Carroll's English."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemo_opdlm.config import Architecture
from nemo_opdlm.convert.hf_folder import dump_json
from nemo_opdlm.convert.source_model import SourceModel, half_split_rope

_SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")
_SPACE = "▁"
# The feed-forward width, 341, is odd: zero rows up to the next multiple of 8 change no output, get no gradient, and
# let tensor parallelism cut the layer.
_FFN_MULTIPLE = 8


def read_glassllm(wheel: Path) -> SourceModel:
    """Read the English model from its wheel."""
    with zipfile.ZipFile(wheel) as archive:
        with archive.open("glassllm/weights/en.npz") as file, np.load(file) as arrays:
            config = json.loads(str(arrays["__config__"]))
            weights = {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in arrays if name[0] != "_"}
        tokenizer = json.loads(archive.read("glassllm/weights/en.tokenizer.json"))
    ffn = weights["blocks.0.ffn.W1"].shape[1]
    architecture = Architecture(
        num_layers=config["n_layers"],
        hidden_size=config["d_model"],
        ffn_hidden_size=-(-ffn // _FFN_MULTIPLE) * _FFN_MULTIPLE,
        num_attention_heads=config["n_heads"],
        num_query_groups=config["n_kv_heads"],
        kv_channels=config["d_model"] // config["n_heads"],
        max_position_embeddings=config["max_len"],
        layernorm_epsilon=config["eps"],
        rotary_base=config["rope_base"],
        share_embeddings_and_output_weights=True,
        vocab_size=config["vocab_size"],
    )
    return SourceModel(
        architecture=architecture,
        state_dict=hugging_face_weights(weights, architecture),
        tokenizer_files=_tokenizer_files(tokenizer, config["max_len"]),
        token_ids={f"{name}_token_id": _SPECIALS.index(f"<{name}>") for name in ("bos", "eos", "pad")},
    )


def hugging_face_weights(weights: dict[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """Rename, transpose ([in, out] -> [out, in]), turn interleaved RoPE into half-split, and pad the feed-forward."""
    padding = architecture.ffn_hidden_size - weights["blocks.0.ffn.W1"].shape[1]
    found = {"model.embed_tokens.weight": weights["E"], "model.norm.weight": weights["norm_f.gamma"]}
    for n in range(architecture.num_layers):
        source, target = f"blocks.{n}.", f"model.layers.{n}."
        q, k, v, o = (weights[f"{source}attn.W_{name}"].T for name in "QKVO")
        gate, down, up = (weights[f"{source}ffn.W{number}"].T for number in (1, 2, 3))
        layer = {
            "input_layernorm": weights[source + "norm1.gamma"],
            "self_attn.q_proj": half_split_rope(q, architecture.num_attention_heads),
            "self_attn.k_proj": half_split_rope(k, architecture.num_query_groups),
            "self_attn.v_proj": v,
            "self_attn.o_proj": o,
            "post_attention_layernorm": weights[source + "norm2.gamma"],
            "mlp.gate_proj": torch.nn.functional.pad(gate, (0, 0, 0, padding)),
            "mlp.up_proj": torch.nn.functional.pad(up, (0, 0, 0, padding)),
            "mlp.down_proj": torch.nn.functional.pad(down, (0, padding)),
        }
        found |= {f"{target}{name}.weight": tensor.contiguous() for name, tensor in layer.items()}
    return found


def _tokenizer_files(source: dict[str, Any], max_length: int) -> dict[str, bytes]:
    """The same character-level BPE as a tokenizer.json: NFC, spaces as ▁, merges never cross a word or a newline."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    merges = [(left, right) for left, right in source["merges"]]
    vocabulary = [*_SPECIALS, *source["alphabet"], *(left + right for left, right in merges)]
    tokenizer = Tokenizer(
        models.BPE({token: id for id, token in enumerate(vocabulary)}, merges, unk_token="<unk>", fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", _SPACE)])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"\n|{_SPACE}*[^{_SPACE}\n]+|{_SPACE}+"), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_SPACE, " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIALS])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": max_length,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True).encode(),
        "tokenizer_config.json": dump_json(config).encode(),
    }
