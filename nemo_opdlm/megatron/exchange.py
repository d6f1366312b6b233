"""Who answers which prompts, and how the records reach every rank: tensors, never text or files.

Ranks with the same weights (data- and context-parallel ones) answer different prompts. Afterwards every rank holds all records:
a few integers per token. Which of them it trains on, and how a checkpoint splits them, then does not depend on who made them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_opdlm.diffusion.packing import longest_first
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.megatron.flight import RolloutGivenUp
from nemo_opdlm.megatron.parallel import ParallelContext

_GIVEN_UP = "given up"


def respond_together(respond: Callable[[Tensor], Trajectory], cost: Tensor, parallel: ParallelContext) -> Trajectory:
    """Let every data rank answer its share of the prompts; all records, in the order of the prompts, on every rank.

    Args:
        respond: row numbers ``[n]`` -> their records; called on ranks that have any.
        cost: int64 ``[S]``, what each prompt may take, in tokens.
        parallel: this process's place in the layout.

    Raises:
        RolloutGivenUp: on every rank, where one gave its share up; the others finish theirs first.
    """
    shares = longest_first(cost, parallel.data_size)
    mine = shares[parallel.data_rank]
    if parallel.data_size == 1:
        return respond(mine).index(mine.argsort())
    parts: list[Any] = [None] * parallel.data_size
    dist.all_gather_object(parts, _state_of_share(respond, mine), group=parallel.groups.dp_cp)
    if _GIVEN_UP in parts:
        raise RolloutGivenUp
    parts = [None if part is None else Trajectory.from_state_dict(part).to(parallel.device) for part in parts]
    rows = torch.cat(shares)
    return Trajectory.cat([part for part in parts if part is not None]).index(rows.argsort())


def _state_of_share(respond: Callable[[Tensor], Trajectory], rows: Tensor) -> dict[str, Any] | str | None:
    try:
        return respond(rows).to("cpu").state_dict() if rows.numel() else None
    except RolloutGivenUp:
        return _GIVEN_UP


def gather_responses(mine: Tensor, response_len: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Values of each response token of all rollouts ``[sum R, ...]``, from the ranks that hold every n-th rollout's.

    Args:
        mine: this rank's, of rollouts ``rank``, ``rank + n``, ``rank + 2 n`` ..., one after the other.
        response_len: int64 ``[B]``, R of all rollouts.
        group: the n ranks.
    """
    num_ranks = dist.get_world_size(group)
    if num_ranks == 1:
        return mine
    lengths = [response_len[rank::num_ranks] for rank in range(num_ranks)]
    longest = max(int(part.sum()) for part in lengths)
    padded = mine.new_zeros(longest, *mine.shape[1:])
    padded[: mine.shape[0]] = mine
    gathered = mine.new_empty(num_ranks * longest, *mine.shape[1:])
    dist.all_gather_into_tensor(gathered, padded, group=group)
    first = torch.empty_like(response_len)
    for rank, part in enumerate(lengths):
        first[rank::num_ranks] = rank * longest + part.cumsum(0) - part
    offset = torch.arange(int(response_len.sum()), device=mine.device)
    offset = offset - (response_len.cumsum(0) - response_len).repeat_interleave(response_len)
    return gathered[first.repeat_interleave(response_len) + offset]
