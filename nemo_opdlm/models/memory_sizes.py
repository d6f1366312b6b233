"""Bytes that one rank holds of one network, by arithmetic: weights, cached keys, and what layers keep and need for a while.

The counts are those of Megatron's own layers with our attention, read off their tensors; `tests/parallel/test_memory_plan.py`
holds them against runs. Small tensors are left out: statistics of norms and softmaxes, indices.
"""

from dataclasses import dataclass
from enum import Enum, auto

import torch

from nemo_opdlm.config import Architecture, ModelConfig
from nemo_opdlm.megatron.chunked_attention import CHUNK_ELEMENTS, CPU_QUERIES, KEPT_ELEMENTS
from nemo_opdlm.megatron.flex import bucket
from nemo_opdlm.megatron.lean_layers import GATE_ELEMENTS

FP32 = 4


class Kernel(Enum):
    """How a pass attends: under one whole mask, chunk by chunk of the queries on a CPU or a GPU, or by FlexAttention."""

    DENSE = auto()
    CPU_CHUNKS = auto()
    GPU_CHUNKS = auto()
    TILES = auto()


@dataclass(frozen=True)
class Tokens:
    """Whole rows of one forward pass.

    Attributes:
        rows: how many.
        length: tokens of each.
        kernel: that attends.
        seen: keys that a token sees at most.
        num_ranks: context-parallel ranks that share each row.
    """

    rows: int
    length: int
    kernel: Kernel
    seen: int
    num_ranks: int = 1

    @property
    def count(self) -> int:
        """Tokens of one rank."""
        return self.rows * self.length // self.num_ranks

    @property
    def gathered(self) -> int:
        """Tokens of all ranks, whose keys a chunk picks from."""
        return self.rows * self.length

    @property
    def padded(self) -> int:
        """Tokens that the kernel works on."""
        return self.rows * bucket(self.length) if self.kernel is Kernel.TILES else self.count

    @property
    def mask_elements(self) -> int:
        """Elements of the whole mask; 0 where there is none."""
        return self.gathered * self.length if self.kernel is Kernel.DENSE else 0

    @property
    def shared_mask(self) -> int:
        """Bytes of the mask that the layers of a batch share, chunks and numbers of their keys; tiles are next to nothing."""
        if self.kernel is Kernel.CPU_CHUNKS:
            elements = min(KEPT_ELEMENTS, self.count * self.seen)
            return elements + elements // (self.rows * CPU_QUERIES) * torch.int64.itemsize
        if self.kernel is Kernel.GPU_CHUNKS:
            return min(KEPT_ELEMENTS, self.count * self.length)
        return self.mask_elements

    @property
    def chunk_elements(self) -> int:
        """Elements of the mask of one chunk; 0 where attention has none."""
        if self.kernel is Kernel.CPU_CHUNKS:
            return self.rows * CPU_QUERIES * self.seen
        return min(CHUNK_ELEMENTS, self.count * self.length) if self.kernel is Kernel.GPU_CHUNKS else 0

    @property
    def picked(self) -> int:
        """Keys that one chunk copies."""
        return self.rows * self.seen if self.kernel is Kernel.CPU_CHUNKS else 0


@dataclass(frozen=True)
class NetworkSizes:
    """One rank's part of a network: a stage of its pipeline, split by tensor parallelism.

    Attributes:
        arch: the network.
        model: layout and recomputation.
        stage: of the pipeline.
        weight_bytes: of one weight, and of the residual stream.
        value_bytes: of one activation inside the layers; below `weight_bytes` under autocast.
        on_gpu: the SwiGLU layer keeps all that it computes; on a CPU only its input (`lean_layers.py`).
    """

    arch: Architecture
    model: ModelConfig
    stage: int
    weight_bytes: int
    value_bytes: int
    on_gpu: bool

    @property
    def tp(self) -> int:
        """Ranks that share each layer."""
        return self.model.tensor_model_parallel_size

    @property
    def is_first(self) -> bool:
        """Whether it embeds."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the head."""
        return self.stage == self.model.pipeline_model_parallel_size - 1

    @property
    def layers(self) -> int:
        """Layers of this stage, all its chunks together."""
        return self.arch.num_layers // self.model.pipeline_model_parallel_size

    @property
    def vocab(self) -> int:
        """Columns of logits."""
        return self.arch.padded_vocab_size(self.tp) // self.tp

    @property
    def vocab_weights(self) -> int:
        """Elements of the embedding, or of the head."""
        return self.vocab * self.arch.hidden_size

    @property
    def queries(self) -> int:
        """Channels of all query heads."""
        return self.arch.num_attention_heads * self.arch.kv_channels // self.tp

    @property
    def keys(self) -> int:
        """Channels of all key heads, and of all value heads."""
        return self.arch.num_query_groups * self.arch.kv_channels // self.tp

    @property
    def ffn(self) -> int:
        """Channels between the two products of the SwiGLU layer."""
        return self.arch.ffn_hidden_size // self.tp

    @property
    def residual(self) -> int:
        """Channels of the residual stream on this rank."""
        return self.arch.hidden_size // (self.tp if self.model.sequence_parallel else 1)

    # -- weights --

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.layers * self._layer_parameters + self._vocab_parameters + self.arch.hidden_size * self.is_last

    @property
    def largest_parameter(self) -> int:
        """Elements of the largest weight."""
        in_layer = 2 * self.ffn * self.arch.hidden_size
        return max(in_layer, self.vocab_weights if self.is_first or self.is_last else 0)

    @property
    def _vocab_parameters(self) -> int:
        is_shared = self.arch.share_embeddings_and_output_weights and self.is_first and self.is_last
        return self.vocab_weights * (1 if is_shared else self.is_first + self.is_last)

    @property
    def _products(self) -> int:
        return self.arch.hidden_size * (2 * self.queries + 2 * self.keys + 3 * self.ffn)

    @property
    def _layer_parameters(self) -> int:
        arch, hidden = self.arch, self.arch.hidden_size
        norms = 2 * hidden + 2 * arch.kv_channels * arch.qk_layernorm
        into_attention = (self.queries + 2 * self.keys) * (arch.bias or arch.qkv_bias)
        others = (2 * hidden + 2 * self.ffn) * arch.bias
        return self._products + norms + into_attention + others

    # -- what stays --

    def cache(self, slots: int, length: int) -> int:
        """Keys and values of `slots` rows, and of the place that takes what is to leave no trace."""
        return self.layers * 2 * slots * (length + 1) * self.keys * self.value_bytes

    def kept(self, tokens: Tokens, layers: int) -> int:
        """What `layers` layers keep of a micro-batch for their backward pass, with recomputation."""
        return self._unrecomputed(layers) * self.kept_by_layer(tokens) + self._checkpoints(layers) * tokens.count * (
            self.residual * self.weight_bytes
        )

    def recomputed(self, tokens: Tokens, layers: int) -> int:
        """What is computed again at a time."""
        if self.model.activations_checkpoint_granularity != "full":
            return 0
        num_layers = self.model.activations_checkpoint_num_layers or 1
        at_a_time = min(num_layers, layers) if self.model.activations_checkpoint_method == "uniform" else 1
        return at_a_time * self.kept_by_layer(tokens)

    def kept_by_layer(self, tokens: Tokens) -> int:
        """What one layer keeps of a micro-batch."""
        value, arch = self.value_bytes, self.arch
        per_token = 2 * self._kept_by_norm(self.residual) + self._kept_by_query_norms * arch.qk_layernorm
        per_token += value * (5 if self.on_gpu else 2) * self.ffn
        # Every layer keeps a copy of the mask as numbers, unless it computes its attention again.
        is_selective = self.model.activations_checkpoint_granularity == "selective"
        mask = value * tokens.mask_elements * (not is_selective)
        # Under autocast each micro-batch keeps the weights as it has cast them.
        cast = value * self._products * (value < self.weight_bytes)
        return tokens.count * per_token + self._kept_by_attention(tokens) + mask + cast

    def keeps_attention(self, layers: int) -> bool:
        """Whether any of `layers` layers has what its attention keeps until its backward pass."""
        return self.model.activations_checkpoint_granularity != "selective" and self._unrecomputed(layers) > 0

    def kept_by_ends(self, tokens: Tokens) -> int:
        """What the final norm keeps, or the message to the next stage."""
        if not self.is_last:
            return tokens.count * self.residual * self.weight_bytes
        gathered = self.arch.hidden_size * self.value_bytes * self.model.sequence_parallel
        return tokens.count * (self._kept_by_norm(self.residual) + gathered)

    def shared_by_layers(self, tokens: Tokens) -> int:
        """Mask and rotation of a batch."""
        return tokens.shared_mask + tokens.count * 2 * self.arch.kv_channels * FP32

    def _unrecomputed(self, layers: int) -> int:
        model = self.model
        if model.activations_checkpoint_granularity != "full":
            return layers
        assert model.activations_checkpoint_num_layers is not None
        is_uniform = model.activations_checkpoint_method == "uniform"
        return 0 if is_uniform else max(0, layers - model.activations_checkpoint_num_layers)

    def _checkpoints(self, layers: int) -> int:
        """Inputs of recomputed layers that are kept."""
        model = self.model
        if model.activations_checkpoint_granularity != "full":
            return 0
        assert model.activations_checkpoint_num_layers is not None
        if model.activations_checkpoint_method == "uniform":
            return -(-layers // model.activations_checkpoint_num_layers)
        return min(layers, model.activations_checkpoint_num_layers)

    def _kept_by_norm(self, channels: int) -> int:
        """A norm in front of a matrix product, which keeps its output."""
        return channels * (self.weight_bytes + self.value_bytes)

    def _kept_by_attention(self, tokens: Tokens) -> int:
        projected = tokens.count * (self.queries + 2 * self.keys)
        if tokens.kernel is not Kernel.TILES:
            # Rotated queries and keys, values, and what attention returns.
            kept = tokens.count * (2 * self.queries + 2 * self.keys)
            return self.value_bytes * (projected * self.arch.qk_layernorm + kept)
        # Padded copies of all three and of what attention returns, and the latter without its padding.
        padded = tokens.padded * (2 * self.queries + 2 * self.keys)
        cut = tokens.count * self.queries * (tokens.padded > tokens.count)
        return self.value_bytes * (projected * self.arch.qk_layernorm + padded + cut)

    @property
    def _kept_by_query_norms(self) -> int:
        return self.queries * self.value_bytes  # a copy; the keys are a view of what was projected

    # -- what is there for a while --

    @property
    def is_lean(self) -> bool:
        """Whether rollouts are counted as `inference.forward_chunk`; on a GPU as Megatron's layers, which need more."""
        return self.tp == 1 and not self.on_gpu

    def cast_in_rollouts(self) -> int:
        """Layers' weights as autocast has cast them, once for all forwards of a rollout."""
        return self.layers * self._products * self.value_bytes * (self.is_lean and self.value_bytes < self.weight_bytes)

    def forward_workspace(self, tokens: Tokens, *, is_lean: bool = False) -> int:
        """A layer at work without gradients: in the SwiGLU layer, or in attention."""
        value = self.value_bytes
        ffn = (4 if is_lean else 5 if self.on_gpu else 2) * self.ffn
        swiglu = tokens.count * value * (ffn + 2 * self.arch.hidden_size + 2 * self.residual)
        swiglu += 0 if is_lean else self._gate_chunk(tokens)
        attention = tokens.count * value * (4 * self.queries + 4 * self.keys + 2 * self.arch.hidden_size)
        # What the chunks return, before it is joined.
        parts = tokens.count * value * self.queries * (tokens.chunk_elements > 0)
        return max(swiglu, attention + parts + tokens.mask_elements * value + self._chunk(tokens))

    def backward_workspace(self, tokens: Tokens) -> int:
        """Gradients of activations and of the largest weight, while a layer goes back: in the SwiGLU layer, or in attention."""
        of_gate = 2 * self.ffn * self.on_gpu
        activations = tokens.count * self.value_bytes * (of_gate + 3 * self.arch.hidden_size) + 4 * self._gate_chunk(
            tokens
        )
        swiglu = activations + 2 * self.ffn * self.arch.hidden_size * self.weight_bytes
        if not tokens.chunk_elements:
            return swiglu
        attention = tokens.count * self.value_bytes * (2 * self.queries + 2 * self.arch.hidden_size)
        return max(swiglu, attention + tokens.gathered * 2 * self.keys * FP32 + self._chunk(tokens))

    def _gate_chunk(self, tokens: Tokens) -> int:
        """A tensor of the rows whose gate is computed at a time on a CPU."""
        return 0 if self.on_gpu else min(tokens.count * self.ffn, GATE_ELEMENTS) * self.value_bytes

    def _chunk(self, tokens: Tokens) -> int:
        """A chunk's mask as numbers, and the keys and values that it picks, or those gathered from other ranks."""
        gathered = tokens.gathered * (tokens.num_ranks > 1)
        return self.value_bytes * (tokens.chunk_elements + (tokens.picked + gathered) * 2 * self.keys)
