"""The only call into Megatron's pipeline schedules: forward passes and forward-backward passes over micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from nemo_opdlm.diffusion.masks import PADDING_DOCUMENT, TokenAttributes
from nemo_opdlm.megatron.network import Network
from nemo_opdlm.megatron.student import StagedGPT, autocast

#: (hidden states [B, N, hidden], micro-batch) -> (loss sum, count, detached metrics)
LossFunction = Callable[[Tensor, "MicroBatch"], tuple[Tensor, Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass.

    Attributes:
        token_ids: ``[B, N]``.
        attributes: of each token, ``[B, N]``.
        payload: what the loss needs beside them.
        is_filler: nothing is learnt or collected from it, it completes a schedule.
    """

    token_ids: Tensor
    attributes: TokenAttributes
    payload: Any = None
    is_filler: bool = False

    def as_filler(self) -> "MicroBatch":
        """Its first row, with nothing to learn or to collect from it."""
        return MicroBatch(self.token_ids[:1], self.attributes.map(lambda x: x[:1]), is_filler=True)


@dataclass(frozen=True)
class RowSplit:
    """Which part of every row this rank works on.

    Attributes:
        rank, num_ranks: its place among the ranks that share each row.
        multiple_of: rows are padded to a multiple of so many columns.
    """

    rank: int = 0
    num_ranks: int = 1
    multiple_of: int = 1

    @staticmethod
    def whole(model: StagedGPT) -> "RowSplit":
        """Whole rows, which sequence parallelism cuts into equal parts by itself."""
        return RowSplit(multiple_of=model.token_multiple)

    @staticmethod
    def over_context(model: StagedGPT) -> "RowSplit":
        """This context-parallel rank's share of every row."""
        parallel = model.parallel
        multiple_of = model.token_multiple * parts_of_a_row(parallel.cp_size)
        return RowSplit(parallel.cp_rank, parallel.cp_size, multiple_of)

    def filled_up_to(self, pack_to_tokens: int) -> "RowSplit":
        """The same with every pack as long as the longest that ``pack_to_tokens`` allows."""
        return replace(self, multiple_of=pack_to_tokens // self.multiple_of * self.multiple_of)

    @property
    def num_columns(self) -> int:
        """Columns of this rank, where rows are filled up."""
        return self.multiple_of // self.num_ranks


def parts_of_a_row(context_parallel_size: int) -> int:
    """Into how many equal parts context parallelism cuts a training row: two for each rank."""
    return 1 if context_parallel_size == 1 else 2 * context_parallel_size


def _schedule(
    model: StagedGPT,
    chunks: Sequence[torch.nn.Module],
    micro_batches: Sequence[MicroBatch],
    finish: Callable[[Tensor, MicroBatch], Any],
    **options: Any,
) -> list[Any]:
    def step(batches: Iterator[MicroBatch], chunk: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches)
        attributes = batch.attributes
        hidden = chunk(batch.token_ids, attributes.position_ids, attributes.stack())
        # Megatron passes non_loss_data=True where it collects outputs instead of losses.
        return hidden, lambda output, **_: finish(output, batch)

    if len(chunks) > 1:
        micro_batches = _same_shape(micro_batches)
    first = micro_batches[0].token_ids
    iterators = [iter(micro_batches) for _ in chunks]
    with autocast(model.options.autocast_dtype, first.device):
        results: list[Any] = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=list(chunks),
            num_microbatches=len(micro_batches),
            # The stages of a plain pipeline tell each other the true shapes (`variable_seq_lengths`).
            # Megatron divides the length by the context-parallel ranks; these are the tokens of one of them.
            seq_length=first.shape[1] * model.parallel.cp_size,
            micro_batch_size=first.shape[0],
            **options,
        )
    return results


def forward_backward(
    network: Network, micro_batches: Sequence[MicroBatch], loss: LossFunction
) -> list[dict[str, Tensor]]:
    """Run one update's forward and backward passes; gradients end as sum / global count in the model's buffers.

    Args:
        network: the student, with Megatron's DistributedDataParallel around its chunks.
        micro_batches: this rank's share of the update, and of each row under context parallelism.
        loss: sums over supervised tokens, so that the result does not depend on the split into micro-batches or ranks.

    Returns:
        The metrics of each micro-batch, on the last pipeline stage.
    """
    batches = _fill_up(network.model, micro_batches)

    def finish(hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        if not batch.is_filler:
            return loss(hidden, batch)
        # No row, but every weight has its gradient, which overlapped reduction waits for.
        nothing = network.head.logits(hidden[0, :0]).sum()
        return nothing, torch.zeros((), dtype=torch.int, device=hidden.device), {}

    with network.model.attention.split_rows():
        metrics = _schedule(network.model, network.ddp, batches, finish, forward_only=False)
    return [of_batch for of_batch in metrics if of_batch]


@torch.no_grad()
def forward_only(
    model: StagedGPT, micro_batches: Sequence[MicroBatch], collect: Callable[[Tensor, MicroBatch], Any]
) -> list[Any]:
    """Run forward passes and return ``collect(hidden states, micro-batch)`` of each, on the last pipeline stage.

    The other stages get an empty list. Rows are whole: context-parallel ranks bring rows of their own.
    """
    if not micro_batches:
        return []
    batches = _fill_up(model, micro_batches)

    def finish(hidden: Tensor, batch: MicroBatch) -> Any:
        return None if batch.is_filler else collect(hidden, batch)

    options = {"forward_only": True, "collect_non_loss_data": True}
    # The interleaved schedule keeps the order of micro-batches, fillers come last.
    return _schedule(model, list(model), batches, finish, **options)[: len(micro_batches)]


def _same_shape(micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Pad all micro-batches to the largest, at the end of rows and columns, where no index of a payload moves."""
    num_rows, length = (max(batch.token_ids.shape[dim] for batch in micro_batches) for dim in (0, 1))

    def padded(batch: MicroBatch) -> MicroBatch:
        def pad(x: Tensor, value: int = 0) -> Tensor:
            return F.pad(x, (0, length - x.shape[1], 0, num_rows - x.shape[0]), value=value)

        attributes = replace(
            batch.attributes.map(pad), document_ids=pad(batch.attributes.document_ids, PADDING_DOCUMENT)
        )
        return replace(batch, token_ids=pad(batch.token_ids), attributes=attributes)

    return [padded(batch) for batch in micro_batches]


def _fill_up(model: StagedGPT, micro_batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Add fillers until the interleaved schedule has a multiple of the stages."""
    missing = -len(micro_batches) % model.parallel.pp_size if len(model) > 1 else 0
    return [*micro_batches, *(micro_batches[0].as_filler() for _ in range(missing))]
