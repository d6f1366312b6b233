"""Names of the tensors of a layer: Transformer Engine fuses norms into the linear layer behind them.

Distributed checkpoints know the fused names only: Megatron's own layers are stored under them, too.
"""

#: Fused -> Megatron's own, and ours wherever tensors are whole.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def own_name(name: str) -> str:
    """The name of a tensor where norms are layers of their own."""
    for fused, own in _FUSED_NORMS.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + own
    return name
