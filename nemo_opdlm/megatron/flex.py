"""FlexAttention on a GPU: tiles of the mask that are empty, as between documents or beyond a cached row, cost nothing.

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
#: Compilations: four lengths to each doubling, two rules, with and without gradients, and caches of as many lengths for each
#: number of slots and block size of a run.
NUM_COMPILATIONS = 256


def bucket(length: int) -> int:
    """The length that rows of so many tokens are padded to: whole tiles, and four lengths to each doubling."""
    step: int = max(TILE, 2 ** (length - 1).bit_length() // 8)
    return -(-length // step) * step


def is_used(wanted: str, on_gpu: bool, head_dim: int) -> bool:
    """Whether ``model.opdlm.attention`` means FlexAttention."""
    return wanted == "flex" or (wanted == "auto" and on_gpu and head_dim >= SMALLEST_HEAD)


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


def cached_block_mask(slots: Tensor, last_visible: Tensor, num_slots: int, length: int) -> BlockMask:
    """Mask of queries to whole caches of ``length`` keys, of which a row reads as many tiles as it sees.

    Args:
        slots: ``[A]``, of the rows that ask.
        last_visible: ``[A, Q]``, the last key that each of a row's queries sees; Q is at most a tile.
        num_slots: the mask has a row for each slot; those that do not ask see nothing.
        length: keys of a slot.
    """
    width = last_visible.shape[1]
    visible = torch.full((num_slots, width), -1, dtype=torch.int32, device=slots.device)
    visible[slots] = last_visible.to(torch.int32)
    num_tiles = visible.amax(1)[:, None, None] // TILE + 1
    tiles = torch.arange(-(-length // TILE), dtype=torch.int32, device=slots.device).expand(num_slots, 1, 1, -1)

    def sees(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= visible[b, q_idx]

    return BlockMask.from_kv_blocks(
        num_tiles, tiles.contiguous(), BLOCK_SIZE=TILE, mask_mod=sees, seq_lengths=(width, length)
    )


def attend_in_tiles(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    """Scaled dot product attention ``[B, heads, Nq, d]`` of ``query`` to ``key`` and ``value [B, groups, Nk, d]``."""
    length = query.shape[2]
    # Under autocast norms hand over wider queries and keys; other than SDPA, the kernel takes one dtype.
    num_queries, num_keys = mask.seq_lengths
    padded = (
        _to_length(x.to(value.dtype), wanted)
        for x, wanted in ((query, num_queries), (key, num_keys), (value, num_keys))
    )
    attend: Callable[..., Any] = flex_attention
    options: dict[str, bool] | None = None
    if query.is_cuda:
        attend, options = _compiled(), _kernel_options(query, key)
    is_grouped = query.shape[1] != key.shape[1]
    out: Tensor = attend(*padded, block_mask=mask, scale=scale, enable_gqa=is_grouped, kernel_options=options)
    return out[:, :, :length]


def _kernel_options(query: Tensor, key: Tensor) -> dict[str, bool] | None:
    """The kernel for few queries takes the heads of a group as further ones, together no more than a tile."""
    num_queries, heads = query.shape[2], query.shape[1] // key.shape[1]
    return {"FORCE_USE_FLEX_ATTENTION": True} if num_queries < TILE < num_queries * heads else None


def _to_length(x: Tensor, length: int) -> Tensor:
    # Padding by nothing would copy, and a cache is large.
    return x if x.shape[2] == length else F.pad(x, (0, 0, 0, length - x.shape[2]))


@functools.cache
def _compiled() -> Callable[..., Any]:
    # Past the limit Dynamo would go on without a compiled kernel, which holds whole masks and scores; `fullgraph` makes it raise.
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, NUM_COMPILATIONS)
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
