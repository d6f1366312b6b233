"""The forward pass of a rollout on a network that no rank shares: Megatron's layers without what training needs of them.

A rollout's forwards are small. Megatron's modules spend as long on autograd functions, hooks and process groups of one rank as a
CPU spends on half of the arithmetic. This reads the same parameters in place and computes the same, operator by operator;
other layouts and kinds of layers take Megatron's own way (`suits`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_opdlm.diffusion.masks import TokenAttributes
from nemo_opdlm.megatron.lean_layers import linear_of_few_rows
from nemo_opdlm.megatron.rotary import rotate_without_gradient
from nemo_opdlm.megatron.student import HiddenStatesGPT, StagedGPT


def suits(model: StagedGPT) -> bool:
    """Whether `forward_chunk` computes what the network does: layers of Megatron's local spec, whole, as we configure them."""
    options = model.options
    is_ours = all(key.startswith("recompute_") for key in options.transformer_config)
    # Under autocast Megatron adds biases in fp32, outside of the layers they belong to.
    is_ours &= not (model.arch.bias and options.autocast_dtype is not None)
    return model.parallel.tp_size == 1 and not options.transformer_engine and options.token_multiple == 1 and is_ours


def forward_chunk(
    chunk: HiddenStatesGPT,
    token_ids: Tensor,
    attributes: TokenAttributes,
    hidden: Tensor | None,
    asked: Tensor,
) -> Tensor:
    """A chunk's hidden states, as the chunk itself returns them, of the last one those asked for; without gradients.

    Args:
        chunk: of a network that `suits`.
        token_ids: ``[1, T]``.
        attributes: of each token.
        hidden: ``[T, 1, hidden]`` from the chunk before; None for the first.
        asked: ``[M]`` tokens whose hidden states ``[1, M, hidden]`` the last chunk returns. Of the others, the last layer
            computes keys, values and attention alone.
    """
    hidden = F.embedding(token_ids[0], chunk.embedding.word_embeddings.weight) if hidden is None else hidden[:, 0]
    if _multiplies_few_rows(hidden):
        hidden = hidden.T.contiguous().T  # in memory as `linear_of_few_rows` returns what is added to it
    stacked, last = attributes.stack(), len(chunk.decoder.layers) - 1
    for number, layer in enumerate(chunk.decoder.layers):
        attended = _attention(layer.self_attention, layer.input_layernorm(hidden), stacked)
        if chunk.post_process and number == last:
            hidden, attended = hidden[asked], attended[asked]
        hidden = _add(hidden, _linear(layer.self_attention.linear_proj, attended))
        hidden = _add(hidden, _mlp(layer.mlp, layer.pre_mlp_layernorm(hidden)))
    if not chunk.post_process:
        return hidden[:, None].to(chunk.config.pipeline_dtype)
    return chunk.decoder.final_layernorm(hidden)[None]  # type: ignore[no-any-return]


def _attention(attention: Any, hidden: Tensor, stacked: Tensor) -> Tensor:
    """What the heads read, ``[T, heads * head_dim]``.

    Of each group of heads, its queries, its key and its value stand side by side.
    """
    core = attention.core_attention
    size, groups = core.config.kv_channels, core.config.num_query_groups
    heads = _linear(attention.linear_qkv, hidden)
    dtype = heads.dtype
    # Rounded once, where attention takes them; and row by row, however the product came.
    heads = torch.empty(heads.shape, device=heads.device).copy_(heads).unflatten(-1, (groups, -1, size))
    turned, value = heads[:, :, :-1], heads[:, :, -1].to(dtype)
    if core.config.qk_layernorm:
        turned = turned.to(dtype)
        turned = torch.cat([attention.q_layernorm(turned[:, :, :-1]), attention.k_layernorm(turned[:, :, -1:])], dim=2)
    plan = core.context.plan(stacked)
    turned = rotate_without_gradient(turned, plan.cos, plan.sin)
    return core.attend_cached(turned[:, :, :-1], turned[:, :, -1], value, plan.mask)[:, 0]  # type: ignore[no-any-return]


def _mlp(mlp: Any, hidden: Tensor) -> Tensor:
    gate, up = _linear(mlp.linear_fc1, hidden).chunk(2, dim=-1)
    return _linear(mlp.linear_fc2, F.silu(gate) * up)


def _add(residual: Tensor, update: Tensor) -> Tensor:
    """Under autocast the residual takes the dtype of what is added to it, as in Megatron."""
    return residual.to(update.dtype).add_(update) if residual.dtype != update.dtype else residual + update


def _multiplies_few_rows(hidden: Tensor) -> bool:
    return not hidden.is_cuda and not torch.is_autocast_enabled(hidden.device.type)


def _linear(module: Any, hidden: Tensor) -> Tensor:
    bias: Tensor | None = module.bias
    if not torch.is_tensor(bias):
        bias = None
    if not _multiplies_few_rows(hidden):
        return F.linear(hidden, module.weight, bias)
    out = linear_of_few_rows(hidden, module.weight)
    return out if bias is None else out + bias
