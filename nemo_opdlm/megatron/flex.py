"""FlexAttention for rows on a GPU: tiles of the mask that are empty, as between documents, cost nothing.

A kernel is compiled for each shape, so rows are padded to one of a few lengths in front of it. Which tokens see each other is
data: another batch of these lengths, and every layer, finds its kernel compiled.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from nemo_opdlm.diffusion.masks import PADDING_DOCUMENT, AttentionRule, TokenAttributes, dense, mask_mod

#: Queries and keys of a tile.
TILE = 128
#: Smallest head dimension that the kernel takes.
SMALLEST_HEAD = 16
#: Mask elements alive at a time while tiles are judged.
CHUNK_ELEMENTS = 2**24
#: Compilations: four lengths to each doubling, two rules, with and without gradients.
NUM_COMPILATIONS = 64


def bucket(length: int) -> int:
    """The length that rows of so many tokens are padded to: whole tiles, and four lengths to each doubling."""
    step = max(TILE, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step


def block_mask(rule: AttentionRule, attributes: TokenAttributes) -> BlockMask:
    """Which tiles of ``[B, N]`` tokens' mask are empty, full or in part visible, at the length of their bucket."""
    tokens = _padded(attributes.map(lambda x: x.to(torch.int32)))
    batch, length = tokens.position_ids.shape
    rows = TILE * max(1, CHUNK_ELEMENTS // (TILE * batch * length))
    visible, full = [], []
    for start in range(0, length, rows):
        part = dense(rule, tokens.map(lambda x, start=start: x[:, start : start + rows]), tokens)  # type: ignore[misc]
        tiles = part.unflatten(3, (-1, TILE)).unflatten(2, (-1, TILE))
        visible.append(tiles.any(5).any(3))
        full.append(tiles.all(5).all(3))
    is_full = torch.cat(full, 2)
    in_part = torch.cat(visible, 2) & ~is_full
    function = mask_mod(rule, tokens, tokens)
    return BlockMask.from_kv_blocks(*_numbers(in_part), *_numbers(is_full), BLOCK_SIZE=TILE, mask_mod=function)


def attend_in_tiles(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """Scaled dot product attention ``[B, heads, N, d]`` of ``query`` to ``key`` and ``value [B, groups, N, d]``."""
    length = query.shape[2]
    # Under autocast norms hand over wider queries and keys; other than SDPA, the kernel takes one dtype.
    padded = (F.pad(x.to(value.dtype), (0, 0, 0, mask.seq_lengths[0] - length)) for x in (query, key, value))
    attend = _compiled() if query.is_cuda else flex_attention
    out: Tensor = attend(*padded, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    return out[:, :, :length]


@functools.cache
def _compiled() -> Callable[..., Any]:
    # Past the limit Dynamo would go on without a compiled kernel, which holds whole masks and scores; `fullgraph` makes it raise.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, NUM_COMPILATIONS)  # type: ignore[attr-defined]
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _padded(attributes: TokenAttributes) -> TokenAttributes:
    """Attributes at the bucket's length; what is added sees its own tile and nothing else, so that it costs next to nothing."""
    batch, length = attributes.position_ids.shape
    columns = torch.arange(length, bucket(length), dtype=torch.int32, device=attributes.position_ids.device)
    documents = (PADDING_DOCUMENT - 1 - columns // TILE).expand(batch, -1)
    added = torch.zeros_like(documents)
    return TokenAttributes(
        torch.cat([attributes.document_ids, documents], 1),
        *(torch.cat([x, added], 1) for x in (attributes.stream_ids, attributes.position_ids, attributes.block_ids)),
    )


def _numbers(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """How many tiles of each row are set, and their numbers, in front of all others: int32 ``[..., R]`` and ``[..., R, C]``."""
    return tiles.sum(-1, dtype=torch.int32), tiles.int().argsort(dim=-1, descending=True, stable=True).int()
