"""Student and teacher network: Megatron's GPTModel with the core attention and the norms of its layer spec swapped.

The student attends by the block-diffusion rule, the teacher (``teacher.py``) is the same class under the causal rule. Both end at
the final hidden states: the LM head runs only on the rows that need it (``head.py``).
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from nemo_opdlm.config import Architecture
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.megatron import flex
from nemo_opdlm.megatron.attention import AttentionContext, BlockDiffusionAttention
from nemo_opdlm.megatron.cpu import wants_cpu
from nemo_opdlm.megatron.lean_layers import GatedRowParallelLinear, hand_over, rms_norm
from nemo_opdlm.megatron.offload import HostWeights
from nemo_opdlm.megatron.optional import has_fused_weight_gradients, transformer_engine_spec
from nemo_opdlm.megatron.parallel import ParallelContext
from nemo_opdlm.megatron.rotary import inverse_frequencies
from nemo_opdlm.megatron.tensor_overlap import ForwardOverlap


@dataclass(frozen=True)
class ModelOptions:
    """How a network is held, as opposed to what it is (``Architecture``).

    Attributes:
        params_dtype: dtype of parameters and activations.
        autocast_dtype: dtype of an autocast region around the forward and backward pass, or None.
        sequence_parallel: Megatron's sequence parallelism (needs TP > 1).
        initialize: fill parameters with random values; switch off where a checkpoint follows.
        transformer_engine: build the layers from Transformer Engine's parts instead of Megatron's own.
        token_multiple: what every rank's tokens of a forward pass have to be a multiple of, for FP8.
        gradient_accumulation_fusion: use Apex's kernel for weight gradients, where it is installed.
        attention: "sdpa", "flex", or "auto" = FlexAttention on a GPU, where heads are wide enough for it.
        transformer_config: further fields of Megatron's ``TransformerConfig`` (recomputation, fusions ...).
    """

    params_dtype: torch.dtype = torch.float32
    autocast_dtype: torch.dtype | None = None
    sequence_parallel: bool = False
    initialize: bool = True
    transformer_engine: bool = False
    token_multiple: int = 1
    gradient_accumulation_fusion: bool = False
    attention: str = "auto"
    transformer_config: dict[str, Any] = field(default_factory=dict)


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm that tells Megatron to sum its gradient over tensor ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        assert self.eps is not None
        return super().forward(x) if x.is_cuda else rms_norm(x, self.weight, self.eps)


class LinearInputNorm(SequenceParallelRMSNorm):
    """The norm in front of a linear layer: under autocast it hands over the dtype that the layer computes in.

    The layer would cast its input to the same values. Under sequence parallelism Megatron scatters the input's gradient in
    the dtype of the input that it was given, which has to be the gradient's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        out, kind = super().forward(x), x.device.type
        return out.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else out


class HiddenStatesGPT(GPTModel):
    """GPTModel whose last stage returns the normed hidden states ``[B, S, hidden]`` instead of logits."""

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self.post_process:
            sent: Tensor = hidden_states.to(self.config.pipeline_dtype)
            return sent
        if self.config.sequence_parallel:
            # The head adds up its shards' gradients itself (copy_to_tensor_model_parallel_region): here they only split.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.pg_collection.tp
            )
        return hidden_states.transpose(0, 1)

    def head_weight(self) -> Tensor:
        """This rank's rows of the LM head ``[V_local, hidden]``, the embedding where they are tied."""
        is_tied = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if is_tied else self.output_layer.weight
        return weight


def autocast(dtype: torch.dtype | None, device: torch.device) -> AbstractContextManager[Any]:
    """Autocast to ``dtype``, or nothing.

    It has to enclose a whole forward-backward call: Megatron's custom backward functions fail outside it on CPU.
    """
    return contextlib.nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def transformer_config(arch: Architecture, parallel: ParallelContext, options: ModelOptions) -> TransformerConfig:
    """Megatron's view of ``arch`` in this layout; dropout is 0, as the method has none."""
    is_interleaved = parallel.virtual_size > 1
    fields: dict[str, Any] = dict(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        layernorm_epsilon=arch.layernorm_epsilon,
        init_method_std=arch.init_method_std,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=arch.bias,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        context_parallel_size=parallel.cp_size,
        sequence_parallel=options.sequence_parallel,
        params_dtype=options.params_dtype,
        pipeline_dtype=options.autocast_dtype or options.params_dtype,
        virtual_pipeline_model_parallel_size=parallel.virtual_size if is_interleaved else None,
        # Micro-batches have the length of their longest row; the stages tell each other their shapes.
        variable_seq_lengths=parallel.pp_size > 1 and not is_interleaved,
        # Interleaved messages in one batch would be mixed up between two stages, as each is before and behind the other.
        # They go one by one instead, and with fixed shapes (`forward.py`), as shapes always travel in a batch.
        overlap_p2p_comm=is_interleaved,
        batch_p2p_comm=not is_interleaved,
        # Megatron refuses its default beside variable lengths, in dense models too.
        moe_token_dispatcher_type="alltoall",
        bf16=options.params_dtype == torch.bfloat16,
        # Transformer Engine makes its parameters on the GPU, those in FP8 only there.
        use_cpu_initialization=not options.transformer_engine,
        perform_initialization=options.initialize,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        # Megatron's name for an activation function of the layer spec's, ours here.
        use_te_activation_func=_has_lean_gate(options),
        gradient_accumulation_fusion=options.gradient_accumulation_fusion and has_fused_weight_gradients(),
        # Every loss is a sum over supervised tokens; Megatron divides once by the global count.
        calculate_per_token_loss=True,
    )
    return TransformerConfig(**{**fields, **options.transformer_config})


def _has_lean_gate(options: ModelOptions) -> bool:
    """Whether `lean_layers` gates: on a CPU, if nothing else is asked of the gate than SwiGLU."""
    is_plain = not any("activation" in name or "glu" in name for name in options.transformer_config)
    return wants_cpu() and not options.transformer_engine and is_plain


def _layer_spec(arch: Architecture, context: AttentionContext, options: ModelOptions) -> ModuleSpec:
    if options.transformer_engine:
        # Norms in front of a linear layer are part of it there.
        spec = copy.deepcopy(transformer_engine_spec(qk_layernorm=arch.qk_layernorm))
    else:
        spec = copy.deepcopy(get_gpt_layer_local_spec(qk_layernorm=arch.qk_layernorm, normalization="RMSNorm"))
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = LinearInputNorm
        if _has_lean_gate(options):
            mlp = spec.submodules.mlp.submodules
            mlp.activation_func, mlp.linear_fc2 = hand_over, GatedRowParallelLinear
    attention = spec.submodules.self_attention.submodules
    if arch.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    attention.core_attention = partial(BlockDiffusionAttention, context)
    return spec


class StagedGPT(torch.nn.ModuleList):
    """This rank's part of one network: one ``HiddenStatesGPT`` per virtual pipeline stage, a single one as a rule.

    Attributes:
        arch: the architecture it was built from.
        attention: state shared by the attention layers of all its chunks.
        options: how it is held.
        parallel: this process's place in the layout.
    """

    def __init__(
        self,
        chunks: Sequence[HiddenStatesGPT],
        arch: Architecture,
        attention: AttentionContext,
        options: ModelOptions,
        parallel: ParallelContext,
    ) -> None:
        super().__init__(chunks)
        self.arch, self.attention, self.options, self.parallel = arch, attention, options, parallel
        self._host_weights: HostWeights | None = None
        self._forward_overlap = ForwardOverlap(self.modules())

    if TYPE_CHECKING:
        # A list of modules does not say of which kind; and a slice of a network is none.
        def __getitem__(self, number: int) -> HiddenStatesGPT: ...  # type: ignore[override]

        def __iter__(self) -> Iterator[HiddenStatesGPT]: ...

    def train(self, mode: bool = True) -> "StagedGPT":
        """Training or evaluation mode."""
        super().train(mode)
        self._forward_overlap.switch(mode)
        return self

    @property
    def config(self) -> TransformerConfig:
        """Megatron's config, one for all chunks."""
        return self[0].config

    @property
    def token_multiple(self) -> int:
        """What the tokens of a forward pass have to be a multiple of: sequence parallelism cuts them into equal parts."""
        return self.options.token_multiple * (self.parallel.tp_size if self.config.sequence_parallel else 1)

    def head_weight(self) -> Tensor:
        """This rank's rows of the LM head ``[V_local, hidden]``; on the last pipeline stage only."""
        return self[-1].head_weight()

    def offload(self) -> None:
        """Keep the weights of a frozen network in host memory from now on, but for the head and within ``on_device``."""
        head = self.head_weight() if self.parallel.is_last_stage else None
        self._host_weights = HostWeights(weight for weight in self.parameters() if weight is not head)

    @property
    def is_offloaded(self) -> bool:
        """Whether its weights wait in host memory."""
        return self._host_weights is not None

    def on_device(self) -> AbstractContextManager[None]:
        """Where its layers run."""
        return contextlib.nullcontext() if self._host_weights is None else self._host_weights.on_device()

    def sharded_weights(self, prefix: str) -> dict[str, Any]:
        """Megatron's sharded view of the weights, chunk by chunk; tensor names in a checkpoint start with ``prefix``."""
        return {f"chunk{number}": chunk.sharded_state_dict(prefix=prefix) for number, chunk in enumerate(self)}

    def load_weights(self, state: Mapping[str, Any], prefix: str) -> None:
        """Take over weights that were loaded into ``sharded_weights(prefix)``."""
        for number, chunk in enumerate(self):
            weights = {name.removeprefix(prefix): value for name, value in state[f"chunk{number}"].items()}
            # Layers have an empty entry for FP8 scales, which checkpoints need not have.
            missing, _ = chunk.load_state_dict(weights, strict=False)
            assert all(name.endswith("_extra_state") for name in missing), missing


def build_model(
    arch: Architecture,
    parallel: ParallelContext,
    rule: AttentionRule,
    options: ModelOptions = ModelOptions(),  # noqa: B008 (frozen)
) -> StagedGPT:
    """Build this rank's part of the network on its device.

    Args:
        arch: layer count, widths, vocabulary ...
        parallel: this process's place in the layout.
        rule: who may attend to whom.
        options: dtype, recomputation, initialisation.
    """
    config = transformer_config(arch, parallel, options)
    assert arch.kv_channels is not None
    inv_freq = inverse_frequencies(arch.kv_channels, arch.rotary_base, arch.rope_scaling).to(parallel.device)
    uses_flex = flex.is_used(options.attention, parallel.device.type == "cuda", arch.kv_channels)
    context = AttentionContext(rule, inv_freq, parallel.groups.cp, uses_flex)
    chunks = [_build_chunk(arch, parallel, context, config, options, stage) for stage in range(parallel.virtual_size)]
    return StagedGPT(chunks, arch, context, options, parallel).to(parallel.device)


def _build_chunk(
    arch: Architecture,
    parallel: ParallelContext,
    context: AttentionContext,
    config: TransformerConfig,
    options: ModelOptions,
    stage: int,
) -> HiddenStatesGPT:
    """Chunk number ``stage`` of this rank; the first and the last one of the pipeline hold embedding and head."""
    vp_stage = stage if parallel.virtual_size > 1 else None
    layers = TransformerBlockSubmodules(
        layer_specs=[_layer_spec(arch, context, options)] * get_num_layers_to_build(config, vp_stage, parallel.pp_rank),
        layer_norm=SequenceParallelRMSNorm,
    )
    chunk = HiddenStatesGPT(
        config=config,
        transformer_layer_spec=layers,
        vocab_size=arch.padded_vocab_size(parallel.tp_size),
        max_sequence_length=arch.max_position_embeddings,
        pre_process=parallel.is_first_stage and stage == 0,
        post_process=parallel.is_last_stage and stage == parallel.virtual_size - 1,
        share_embeddings_and_output_weights=arch.share_embeddings_and_output_weights,
        position_embedding_type="none",
        pg_collection=parallel.groups,
        vp_stage=vp_stage,
    )
    _mark_shards(chunk)
    return chunk


def _mark_shards(chunk: HiddenStatesGPT) -> None:
    """Say which weights are shards of a larger one: Megatron does it only while it fills them with random values.

    Of a weight without the mark, the gradient norm would count the first tensor-parallel rank's part only.
    """
    dims = ((VocabParallelEmbedding, 0), (ColumnParallelLinear, 0), (RowParallelLinear, 1))
    for module in chunk.modules():
        dim = next((dim for kind, dim in dims if isinstance(module, kind)), None)
        weight = getattr(module, "weight", None)
        if dim is not None and weight is not None and not hasattr(weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=dim, stride=1)
