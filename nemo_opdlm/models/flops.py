"""Floating-point operations of a run, for its model FLOPs utilisation (MFU)."""

from collections.abc import Sequence

from nemo_opdlm.config import Architecture


def layer_weights(arch: Architecture) -> int:
    """Weights of one layer's matrices: query, key, value and output projections, and the three of SwiGLU."""
    query, key = arch.num_attention_heads * arch.kv_channels, arch.num_query_groups * arch.kv_channels
    return arch.hidden_size * (2 * query + 2 * key + 3 * arch.ffn_hidden_size)


def forward_flops(arch: Architecture, work: Sequence[float]) -> float:
    """FLOPs of a forward pass; a backward pass has twice as many.

    ``2 * (layers * (weights of a layer * tokens + 2 * width of all query heads * pairs) + vocabulary * hidden * logits)``:
    a multiplication and an addition for each weight that a token meets, and for each element of a query in the score and in
    the weighted value of each pair. Norms, rotations, softmax, the embedding and what pads the vocabulary are left out.

    torch's `FlopCounterMode` counts the same products of a training step but for some it has no formula for: those added in
    place (`addmm_`), as the gradient of the head is, and attention on a CPU. Attention elsewhere it counts with hidden pairs.

    Args:
        arch: the network.
        work: numbers of tokens, pairs and logits (`diffusion.work.Work`).
    """
    num_tokens, num_pairs, num_logits = work
    width = arch.num_attention_heads * arch.kv_channels
    layers = arch.num_layers * (layer_weights(arch) * num_tokens + 2 * width * num_pairs)
    return 2.0 * (layers + arch.vocab_size * arch.hidden_size * num_logits)
