"""The SDAR export: the folder that SGLang and LMDeploy serve. Both know the model by name and hard-code its mask id."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_opdlm.config import Architecture
from nemo_opdlm.convert.families import OUTPUT_LAYER, WORD_EMBEDDINGS
from nemo_opdlm.convert.hf_folder import GENERATION_CONFIG, MAX_SHARD_SIZE, save_hf_folder
from nemo_opdlm.convert.hugging_face import HfOrigin, HfWeights
from nemo_opdlm.convert.mask_token import QWEN3_MASK_ID
from nemo_opdlm.convert.tokenizer_files import readable_by_transformers_4, register_mask_token

END_OF_TEXT, END_OF_TURN = 151643, 151645
THRESHOLD = 0.9  # the confidence at which the method rolls out

# transformers knows no `sdar`; without this file AutoConfig rejects the folder.
_CONFIGURATION_SDAR = '''\
"""Configuration of an SDAR model, a Qwen3 network decoded by block diffusion."""

from transformers import PretrainedConfig


class SDARConfig(PretrainedConfig):
    model_type = "sdar"
'''
_LAUNCH = """\
# Block grid: absolute (block k = positions [k * {block_size}, (k + 1) * {block_size}) from the first prompt token).
python3 -m sglang.launch_server --model-path {path} --trust-remote-code --dllm-algorithm LowConfidence \\
    --dllm-algorithm-config {path}/dllm_algorithm.yaml --attention-backend flashinfer --mem-fraction-static 0.6 \\
    --max-running-requests 128
lmdeploy serve api_server {path} --backend pytorch --trust-remote-code --dllm-block-length {block_size} \\
    --dllm-denoising-steps {block_size} --dllm-unmasking-strategy low_confidence_dynamic \\
    --dllm-confidence-threshold {threshold}
"""
_SERVING = """\
# Serving

Block diffusion in blocks of {block_size} tokens, on the grid that training used. Run in this folder:

```
{launch}```
"""


def check_is_sdar(architecture: Architecture, origin: HfOrigin) -> None:
    """Refuse models that the engines would serve wrongly.

    Raises:
        ValueError: not a Qwen3 model, or its mask token is not the one the engines hard-code.
    """
    if origin.family != "qwen3":
        raise ValueError(f"--format sdar is for Qwen3 only, this model is {origin.family!r}; use --format hf")
    if origin.mask_token_id != QWEN3_MASK_ID:
        raise ValueError(
            f"--format sdar needs mask_token_id={QWEN3_MASK_ID}, which the serving engines hard-code; this model has "
            f"{origin.mask_token_id} ({origin.mask_token!r}); use --format hf"
        )
    if origin.added_rows or architecture.vocab_size <= QWEN3_MASK_ID:
        raise ValueError(f"--format sdar needs the Qwen3 vocabulary, this model has {architecture.vocab_size} rows")


def sdar_config(architecture: Architecture, block_size: int) -> dict[str, Any]:
    """Content of the folder's config.json.

    RoPE stays flat: engines read `rope_theta` and fall back to 10000 without it. `torch_dtype` is what engines compute
    in, whatever type the weights are stored in: for fp32 they would choose fp16.
    """
    return {
        "architectures": ["SDARForCausalLM"],
        "model_type": "sdar",
        "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
        "block_size": block_size,
        "mask_token_id": QWEN3_MASK_ID,
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.ffn_hidden_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_attention_heads,
        "num_key_value_heads": architecture.num_query_groups,
        "head_dim": architecture.kv_channels,
        "hidden_act": "silu",
        "rms_norm_eps": architecture.layernorm_epsilon,
        "rope_theta": architecture.rotary_base,
        "rope_scaling": None if architecture.rope_scaling is None else dict(architecture.rope_scaling),
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": architecture.max_position_embeddings,
        "initializer_range": architecture.init_method_std,
        "tie_word_embeddings": False,
        "use_cache": True,
        "sliding_window": None,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": END_OF_TEXT,
        "eos_token_id": END_OF_TEXT,
    }


def launch_lines(output: str | Path, block_size: int, threshold: float = THRESHOLD) -> str:
    """Shell commands that serve the exported folder, and the block grid they decode on."""
    return _LAUNCH.format(path=output, block_size=block_size, threshold=threshold)


def megatron_to_sdar(
    state_dict: Mapping[str, Tensor],
    architecture: Architecture,
    origin: HfOrigin,
    tokenizer_files: Mapping[str, bytes],
    output: str | Path,
    *,
    block_size: int,
    threshold: float = THRESHOLD,
    dtype: torch.dtype | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
) -> str:
    """Write Megatron weights as an SDAR folder; the head is written out even when training tied it.

    Args:
        state_dict, architecture, origin, tokenizer_files, output, dtype, max_shard_size: as for `megatron_to_hf`.
        block_size: block size of training.
        threshold: confidence threshold written into `dllm_algorithm.yaml`.

    Returns:
        The launch lines.

    Raises:
        ValueError: the engines cannot serve this model, `output` exists, or weights do not fit the architecture.
    """
    check_is_sdar(architecture, origin)
    if architecture.share_embeddings_and_output_weights:
        # A copy: safetensors refuses two names for one piece of memory.
        state_dict = {**state_dict, OUTPUT_LAYER: state_dict[WORD_EMBEDDINGS].clone()}
        architecture = replace(architecture, share_embeddings_and_output_weights=False)
    weights = HfWeights(state_dict, architecture, origin, dtype)
    generation = {"do_sample": True, "temperature": 1.0, "top_p": 1.0} | origin.generation_config
    generation |= {"eos_token_id": [END_OF_TURN, END_OF_TEXT], "pad_token_id": END_OF_TEXT, "bos_token_id": END_OF_TEXT}
    save_hf_folder(
        output,
        weights.stream(),
        weights.nbytes(),
        {
            "config.json": sdar_config(architecture, block_size),
            "configuration_sdar.py": _CONFIGURATION_SDAR,
            "dllm_algorithm.yaml": f"threshold: {threshold}\nblock_size: {block_size}\n",
            "SERVING.md": _SERVING.format(block_size=block_size, launch=launch_lines(".", block_size, threshold)),
            GENERATION_CONFIG: generation,
            **readable_by_transformers_4(register_mask_token(tokenizer_files, origin.mask_token, QWEN3_MASK_ID)),
        },
        max_shard_size,
    )
    return launch_lines(output, block_size, threshold)
