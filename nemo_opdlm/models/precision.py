"""NeMo's names for the type of stored weights."""

import torch

#: ``precision`` of an archive and ``--precision`` of the converters -> dtype of the stored weights.
PRECISIONS = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}


def precision_name(dtype: torch.dtype) -> str:
    """The key of ``PRECISIONS`` that an archive says its weights are stored in."""
    return {value: key for key, value in PRECISIONS.items()}[dtype]
