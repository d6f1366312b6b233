"""Which rows share a micro-batch, and which rows a rank is dealt: longest first, always to the one that has least."""

import heapq

import torch
from torch import Tensor


def longest_first(cost: Tensor, num_shares: int) -> list[Tensor]:
    """Deal rows, the most expensive first and always to the share that costs least; ``[S]`` -> row numbers.

    A share then ends with the cheap ones, so that all cost about the same.
    """
    load = [(0, share) for share in range(num_shares)]
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    costs: list[int] = cost.tolist()
    for row in sorted(range(len(costs)), key=lambda row: -costs[row]):
        least, share = heapq.heappop(load)
        shares[share].append(row)
        heapq.heappush(load, (least + costs[row], share))
    return [torch.tensor(share, dtype=torch.int64, device=cost.device) for share in shares]


def pack(lengths: Tensor, capacity: int) -> list[Tensor]:
    """Packs of rows ``[S]`` -> row numbers, as few as dealing them finds room in, none longer than ``capacity`` tokens.

    The packs are of about one length: where a schedule wants micro-batches of one shape, or a kernel a few, little is
    padded. Each row has to fit by itself.
    """
    assert 0 < int(lengths.max()) <= capacity, (int(lengths.max()), capacity)
    num_packs = -(-int(lengths.sum()) // capacity)
    while True:
        packs = longest_first(lengths, num_packs)
        if all(int(lengths[rows].sum()) <= capacity for rows in packs):
            return packs
        num_packs += 1
