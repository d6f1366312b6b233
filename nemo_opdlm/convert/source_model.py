"""What every reader of a foreign checkpoint returns, and the one trap they share."""

from dataclasses import dataclass, field

from torch import Tensor

from nemo_opdlm.config import Architecture


@dataclass(frozen=True)
class SourceModel:
    """A Llama-style model under Hugging Face names, in memory.

    Attributes:
        architecture: the network's shape.
        state_dict: Hugging Face name -> fp32 tensor.
        tokenizer_files: file name -> content.
        token_ids: `bos_token_id`, `eos_token_id`, `pad_token_id`.
    """

    architecture: Architecture
    state_dict: dict[str, Tensor] = field(repr=False)
    tokenizer_files: dict[str, bytes] = field(repr=False)
    token_ids: dict[str, int]


def half_split_rope(projection: Tensor, heads: int) -> Tensor:
    """Reorder the rows of a query or key projection [heads * dim, H] from interleaved to half-split RoPE.

    Interleaved RoPE turns the channel pairs (0, 1), (2, 3) ...; half-split RoPE the pairs (0, dim/2), (1, dim/2+1) ..
    Both give the same attention scores when queries and keys are reordered alike; without it the logits are wrong.
    """
    rows, width = projection.shape
    return projection.reshape(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)
