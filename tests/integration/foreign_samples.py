"""Checkpoints of NeMo 1.x, NeMo 2.0 and Megatron-Bridge, made from a tiny Hugging Face folder as those trainers lay them out."""

import argparse
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor

from nemo_opdlm.config import Architecture
from nemo_opdlm.convert.hugging_face import hf_to_megatron
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.megatron.checkpoint import write_sharded
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.testing import tiny

GPT = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model.MegatronGPTModel"
_TE_NAMES = (
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
)
TRACKERS = ("latest_train_state.pt", "latest_checkpointed_iteration.txt")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


@dataclass(frozen=True)
class Sample:
    """A model of which checkpoints are made.

    Attributes:
        architecture: of the network.
        tensors: Megatron name -> whole tensor.
        tokenizer: file name -> content, without a mask token.
    """

    architecture: Architecture
    tensors: dict[str, Tensor]
    tokenizer: dict[str, bytes]

    @staticmethod
    def of(hf_folder: Path) -> "Sample":
        """The model in a Hugging Face folder, without the mask row that the converter may have added."""
        imported = hf_to_megatron(hf_folder)
        rows = imported.architecture.vocab_size - imported.origin.added_rows
        tensors = dict(imported.state_dict)
        for name in tensors.keys() & set(_VOCABULARY):
            tensors[name] = tensors[name][:rows].clone()
        return Sample(imported.architecture, tensors, tiny.tokenizer_files())

    def with_padding(self, rows: int) -> "Sample":
        """The same with a vocabulary padded by rows that must never count."""
        padded = {
            name: torch.cat([tensor, torch.full((rows - len(tensor), tensor.shape[1]), 9.0)])
            for name, tensor in self.tensors.items()
            if name in _VOCABULARY
        }
        return Sample(self.architecture, {**self.tensors, **padded}, self.tokenizer)


def nemo_1_settings(arch: Architecture, **changes: Any) -> dict[str, Any]:
    """`model_config.yaml` of NeMo 1.x; a change to None leaves the key out."""
    settings = {
        "target": GPT,
        "mcore_gpt": True,
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.kv_channels,
        "encoder_seq_length": arch.max_position_embeddings,
        "layernorm_epsilon": arch.layernorm_epsilon,
        "rotary_base": arch.rotary_base,
        "init_method_std": arch.init_method_std,
        "bias": arch.bias,
        "qkv_bias": arch.qkv_bias,
        "qk_layernorm": arch.qk_layernorm,
        "share_embeddings_and_output_weights": arch.share_embeddings_and_output_weights,
        "activation": "fast-swiglu",
        "normalization": "rmsnorm",
        "position_embedding_type": "rope",
        "rotary_percentage": 1.0,
        "hidden_dropout": 0.0,
        "make_vocab_size_divisible_by": 128,
        "override_vocab_size": None,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "tokenizer": {"library": "huggingface", "type": "some/hub-name", "vocab_file": None},
    }
    if arch.rope_scaling is not None and arch.rope_scaling["rope_type"] == "linear":
        settings["seq_len_interpolation_factor"] = arch.rope_scaling["factor"]
    return {key: value for key, value in {**settings, **changes}.items() if value is not None}


def megatron_settings(arch: Architecture, **changes: Any) -> dict[str, Any]:
    """The model section of NeMo 2.0 and Megatron-Bridge, with the names of classes and functions that they write."""
    settings = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "num_layers": arch.num_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.ffn_hidden_size,
        "num_attention_heads": arch.num_attention_heads,
        "num_query_groups": arch.num_query_groups,
        "kv_channels": arch.kv_channels,
        "seq_length": arch.max_position_embeddings,
        "layernorm_epsilon": arch.layernorm_epsilon,
        "rotary_base": arch.rotary_base,
        "rotary_percent": 1.0,
        "add_bias_linear": arch.bias,
        "add_qkv_bias": arch.qkv_bias and not arch.bias,
        "qk_layernorm": arch.qk_layernorm,
        "share_embeddings_and_output_weights": arch.share_embeddings_and_output_weights,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "gated_linear_unit": True,
        "normalization": "RMSNorm",
        "position_embedding_type": "rope",
        "vocab_size": arch.vocab_size,
        "num_moe_experts": None,
        "params_dtype": {"_target_": "torch.float32", "_call_": False},
    }
    if arch.rope_scaling is not None and arch.rope_scaling["rope_type"] == "llama3":
        names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        keys = ("scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")
        settings |= {key: arch.rope_scaling[name] for key, name in zip(keys, names, strict=True)}
    return {**settings, **changes}


# -- one file, or one file per rank --


def state_dict(sample: Sample, prefix: str = "model.") -> dict[str, Any]:
    """As Transformer Engine's layers name their tensors, with the entries that are no weights."""
    state: dict[str, Any] = {}
    for name, tensor in sample.tensors.items():
        for local, fused in _TE_NAMES:
            name = name.replace(local, fused)
        state[prefix + name] = tensor.clone()
    state[f"{prefix}decoder.layers.0.self_attention.core_attention._extra_state"] = None
    state[f"{prefix}decoder.layers.0.mlp.linear_fc1._extra_state"] = io.BytesIO(b"fp8")
    return state


def rank_state_dicts(sample: Sample, tensor: int, pipeline: int, prefix: str = "model.") -> dict[str, dict[str, Any]]:
    """Folder of a rank -> its tensors, cut as Megatron cuts them, layers numbered within their stage."""
    per_stage = sample.architecture.num_layers // pipeline
    folders = {}
    for stage in range(pipeline):
        for rank in range(tensor):
            name = f"mp_rank_{rank:02d}" if pipeline == 1 else f"tp_rank_{rank:02d}_pp_rank_{stage:03d}"
            state = {}
            for key, value in state_dict(sample, prefix).items():
                local = _local_key(key, stage, pipeline, per_stage)
                if local is not None:
                    state[local] = _shard(key, value, rank, tensor) if isinstance(value, Tensor) else value
            if sample.architecture.share_embeddings_and_output_weights and pipeline > 1 and stage == pipeline - 1:
                embedding = sample.tensors["embedding.word_embeddings.weight"]
                state[f"{prefix}output_layer.weight"] = embedding.chunk(tensor)[rank].clone()
            folders[name] = state
    return folders


def _local_key(key: str, stage: int, pipeline: int, per_stage: int) -> str | None:
    layer = re.search(r"(?<=layers\.)\d+", key)
    if layer is None:
        home = 0 if "embedding" in key else pipeline - 1
        return key if stage == home else None
    number = int(layer[0])
    if number // per_stage != stage:
        return None
    return key[: layer.start()] + str(number % per_stage) + key[layer.end() :]


def _shard(key: str, value: Tensor, rank: int, ranks: int) -> Tensor:
    if "norm" in key or key.endswith(("linear_proj.bias", "linear_fc2.bias")):
        return value.clone()
    if "linear_fc1" in key:
        gate, up = value.chunk(2)
        return torch.cat([gate.chunk(ranks)[rank], up.chunk(ranks)[rank]])
    return value.chunk(ranks, dim=1 if "linear_proj" in key or "linear_fc2" in key else 0)[rank].clone()


# -- distributed --


def write_distributed(
    folder: Path, sample: Sample, prefix: str, metadata: dict[str, Any] | None = None, training_state: bool = False
) -> None:
    """A `torch_dist` checkpoint by Megatron's own description of the network.

    Args:
        folder: to write to.
        sample: the model.
        prefix: of all keys.
        metadata: Megatron's options of the layout (layers stacked or not ...).
        training_state: add what a trainer stores besides weights, and a `common.pt` with more than plain data in it.
    """
    folder.mkdir(parents=True)
    rows = len(sample.tensors["embedding.word_embeddings.weight"])
    arch = Architecture(**{**vars(sample.architecture), "vocab_size": rows, "make_vocab_size_divisible_by": 1})
    network = tiny.random_network(arch, initialize(), AttentionRule.CAUSAL)
    network[0].load_state_dict(sample.tensors, strict=False)
    state = network[0].sharded_state_dict(prefix=prefix, metadata=metadata)
    if training_state:
        state["rng_state"] = ShardedObject("rng_state", [{"seed": 1}], (1, 1), (0, 0))
        moments = network[0].sharded_state_dict(prefix="optimizer.state.exp_avg." + prefix, metadata=metadata)
        state |= {key: value for key, value in moments.items() if not key.endswith("_extra_state")}
    write_sharded(folder, state)
    if training_state:
        torch.save({"args": argparse.Namespace(lr=1.0)}, folder / "common.pt")


def write_folder(folder: Path, files: dict[str, bytes]) -> Path:
    """Write small files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


# -- whole checkpoints --


def nemo_1(
    folder: Path,
    sample: Sample,
    weights: dict[str, dict[str, Any]] | str,
    tokenizer: bool = True,
    metadata: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """An extracted NeMo 1.x archive.

    Args:
        folder: to create.
        sample: the model.
        weights: folder ("" for the archive's own) -> state dict, or the prefix of a distributed checkpoint.
        tokenizer: add the tokenizer's files.
        metadata: options of a distributed checkpoint.
        changes: of the settings.
    """
    settings = nemo_1_settings(sample.architecture, **changes)
    members = {f"{number:032x}_{name}": content for number, (name, content) in enumerate(sample.tokenizer.items())}
    if tokenizer:
        settings["tokenizer"] |= {f"file_{i}": f"nemo:{member}" for i, member in enumerate(members)}
        write_folder(folder, members)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_config.yaml").write_text(yaml.safe_dump(settings))
    if isinstance(weights, str):
        write_distributed(folder / "model_weights", sample, weights, metadata)
        return folder
    for name, state in weights.items():
        (folder / name).mkdir(exist_ok=True)
        torch.save(state, folder / name / "model_weights.ckpt")
    return folder


def nemo_2(folder: Path, sample: Sample, tokenizer: bool = True, as_json: bool = False, **changes: Any) -> Path:
    """A NeMo 2.0 folder, its settings in `model.yaml` or in `io.json` alone."""
    write_distributed(folder / "weights", sample, "module.", training_state=True)
    settings = megatron_settings(sample.architecture, **changes)
    context = write_folder(folder / "context", {"io.json": _fiddle_json(settings)})
    if not as_json:
        model = {"_target_": "nemo.collections.llm.gpt.model.qwen3.Qwen3Model", "config": settings, "optim": None}
        (context / "model.yaml").write_text(yaml.safe_dump(model))
    if tokenizer:
        write_folder(context / "nemo_tokenizer", sample.tokenizer)
    return folder


def bridge(folder: Path, sample: Sample, tokenizer: bool = True, text: str = "", **changes: Any) -> Path:
    """A Megatron-Bridge run of one iteration; `text` is added to its settings."""
    iteration = folder / "iter_0000010"
    write_distributed(iteration, sample, "", training_state=True)
    run = {"model": megatron_settings(sample.architecture, **changes), "train": {"train_iters": 10}}
    (iteration / "run_config.yaml").write_text(yaml.safe_dump(run) + text)
    torch.save({"step": torch.tensor(10, dtype=torch.int32)}, folder / "latest_train_state.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("10")
    if tokenizer:
        write_folder(iteration / "tokenizer", sample.tokenizer)
    return folder


def pack(folder: Path, leave_out: Callable[[str], bool] = lambda name: False) -> Path:
    """Tar an extracted archive as NeMo does, without some members."""
    path = folder.with_suffix(".nemo")
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*")):
            name = f"./{file.relative_to(folder)}"
            if not leave_out(name):
                tar.add(file, name, recursive=False)
    return path


def _fiddle_json(settings: dict[str, Any]) -> bytes:
    def value(item: Any) -> Any:
        if isinstance(item, dict):
            module, _, name = str(item["_target_"]).rpartition(".")
            return {"type": "pyref", "module": module, "name": name}
        return {"type": "leaf", "value": item, "paths": ["<root>.x"]}

    items: Iterable[tuple[str, Any]] = ((f"Attr(name='{key}')", value(item)) for key, item in settings.items())
    config = {"type": {"type": "pyref", "module": "fiddle", "name": "Config"}, "items": [list(item) for item in items]}
    other = {
        "type": {"type": "pyref", "module": "fiddle", "name": "Config"},
        "items": [["Attr(name='lr')", {"type": "leaf"}]],
    }
    objects = {"adam_1": other, "qwen3_config_1": config}
    return json.dumps({"root": {"type": "ref", "key": "qwen3_config_1"}, "objects": objects}).encode()
