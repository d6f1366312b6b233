"""Bytes that one rank holds of one network, by arithmetic: weights, cached keys, and what layers keep and need for a while.

The counts are those of Megatron's own layers with our attention, read off their tensors; `tests/parallel/test_memory_plan.py`
holds them against runs. Small tensors are left out: statistics of norms and softmaxes, indices.
"""

from dataclasses import dataclass

from nemo_opdlm.config import Architecture, ModelConfig
from nemo_opdlm.megatron.attention import DENSE_ELEMENTS
from nemo_opdlm.megatron.chunked_attention import CHUNK_ELEMENTS

FP32 = 4


@dataclass(frozen=True)
class Tokens:
    """Whole rows of one forward pass.

    Attributes:
        rows: how many.
        length: tokens of each.
        num_ranks: context-parallel ranks that share each row.
        is_dense: the mask is whole however large it is, as in front of a cache.
    """

    rows: int
    length: int
    num_ranks: int = 1
    is_dense: bool = False

    @property
    def count(self) -> int:
        """Tokens of one rank."""
        return self.rows * self.length // self.num_ranks

    @property
    def mask_elements(self) -> int:
        """Elements of the dense attention mask; 0 where attention goes chunk by chunk."""
        elements = self.rows * self.length**2
        is_whole = self.is_dense or (self.num_ranks == 1 and elements <= DENSE_ELEMENTS)
        return elements if is_whole else 0

    @property
    def chunk_elements(self) -> int:
        """Elements of the mask of one chunk; 0 where the mask is whole."""
        return 0 if self.mask_elements else min(CHUNK_ELEMENTS, self.rows * self.length**2)


@dataclass(frozen=True)
class NetworkSizes:
    """One rank's part of a network: a stage of its pipeline, split by tensor parallelism.

    Attributes:
        arch: the network.
        model: layout and recomputation.
        stage: of the pipeline.
        weight_bytes: of one weight, and of the residual stream.
        value_bytes: of one activation inside the layers; below `weight_bytes` under autocast.
        fuses_norms: norms keep their input and nothing else, as on a GPU. On a CPU they keep it and its normed form in fp32.
    """

    arch: Architecture
    model: ModelConfig
    stage: int
    weight_bytes: int
    value_bytes: int
    fuses_norms: bool

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
        # Projected together; rotated queries and keys; what attention returns; the SwiGLU layer's inputs and products.
        per_token += value * ((self.queries + 2 * self.keys) + (self.queries + self.keys) + self.queries + 5 * self.ffn)
        # Every layer keeps a copy of the mask as numbers, unless it computes its attention again.
        is_selective = self.model.activations_checkpoint_granularity == "selective"
        mask = value * tokens.mask_elements * (not is_selective)
        # Under autocast each micro-batch keeps the weights as it has cast them.
        cast = value * self._products * (value < self.weight_bytes)
        return tokens.count * per_token + mask + cast

    def kept_by_ends(self, tokens: Tokens) -> int:
        """What the final norm keeps, or the message to the next stage."""
        if not self.is_last:
            return tokens.count * self.residual * self.weight_bytes
        gathered = self.arch.hidden_size * self.value_bytes * self.model.sequence_parallel
        return tokens.count * (self._kept_by_norm(self.residual) + gathered)

    def shared_by_layers(self, tokens: Tokens) -> int:
        """Mask and rotation of a batch."""
        return tokens.mask_elements + tokens.count * 2 * self.arch.kv_channels * FP32

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
        return channels * ((self.weight_bytes if self.fuses_norms else 2 * FP32) + self.value_bytes)

    @property
    def _kept_by_query_norms(self) -> int:
        if self.fuses_norms:
            return self.queries * self.value_bytes  # a copy; the keys are a view of what was projected
        keys = FP32 if self.value_bytes == FP32 else 2 * FP32
        return self.queries * 2 * FP32 + self.keys * keys

    # -- what is there for a while --

    def forward_workspace(self, tokens: Tokens) -> int:
        """A layer at work without gradients: in the SwiGLU layer, or in attention."""
        value = self.value_bytes
        swiglu = tokens.count * value * (5 * self.ffn + 2 * self.arch.hidden_size + 2 * self.residual)
        attention = tokens.count * value * (3 * self.queries + 4 * self.keys + 2 * self.arch.hidden_size)
        return max(swiglu, attention + self._mask_workspace(tokens))

    def backward_workspace(self, tokens: Tokens) -> int:
        """Gradients of activations and of the largest weight, while a layer goes back."""
        activations = tokens.count * self.value_bytes * (2 * self.ffn + 3 * self.arch.hidden_size)
        return activations + 2 * self.ffn * self.arch.hidden_size * self.weight_bytes + self._chunks(tokens)

    def _mask_workspace(self, tokens: Tokens) -> int:
        return tokens.mask_elements * self.value_bytes + self._chunks(tokens)

    def _chunks(self, tokens: Tokens) -> int:
        return tokens.chunk_elements * (1 + self.value_bytes)
