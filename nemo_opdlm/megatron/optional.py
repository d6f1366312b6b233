"""What Transformer Engine and NVIDIA Apex add where they are installed; without them nothing here imports either.

Megatron finds the rest by itself: Transformer Engine's or Apex's Adam and its multi-tensor kernels. Apex's fused norms are
never used, as the layers have norms of their own.
"""

import importlib.util

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.spec_utils import ModuleSpec

from nemo_opdlm.megatron.cpu import wants_cpu


def transformer_engine_spec(*, qk_layernorm: bool) -> ModuleSpec:
    """Megatron's layer of Transformer Engine's parts.

    Raises:
        ValueError: Transformer Engine or a GPU is missing. Megatron would fail on a name, or leave FP8 out.
    """
    if importlib.util.find_spec("transformer_engine") is None or wants_cpu():
        raise ValueError("model.transformer_engine=True needs Transformer Engine and a GPU; use False here")
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_layernorm)


def has_fused_weight_gradients() -> bool:
    """Whether Apex was built with the kernel that adds a weight gradient to its buffer, and there is a GPU to run it."""
    return not wants_cpu() and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None
