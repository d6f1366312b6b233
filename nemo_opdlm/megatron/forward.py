"""The only call into Megatron's pipeline schedules: forward passes and forward-backward passes over micro-batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from nemo_opdlm.diffusion.masks import TokenAttributes
from nemo_opdlm.megatron.student import autocast

#: (hidden states [B, N, hidden], micro-batch) -> (loss sum, count, detached metrics)
LossFunction = Callable[[Tensor, "MicroBatch"], tuple[Tensor, Tensor, dict[str, Tensor]]]


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass: token ids ``[B, N]``, their attributes and whatever the loss needs beside them."""

    token_ids: Tensor
    attributes: TokenAttributes
    payload: Any = None


def _network(model: torch.nn.Module) -> torch.nn.Module:
    return model.module if hasattr(model, "module") else model


def _schedule(
    model: torch.nn.Module,
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

    network = _network(model)
    with autocast(network.options.autocast_dtype, micro_batches[0].token_ids.device):
        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=iter(micro_batches),
            model=[model],
            num_microbatches=len(micro_batches),
            seq_length=micro_batches[0].token_ids.shape[1],
            micro_batch_size=micro_batches[0].token_ids.shape[0],
            **options,
        )


def forward_backward(
    model: torch.nn.Module, micro_batches: Sequence[MicroBatch], loss: LossFunction
) -> list[dict[str, Tensor]]:
    """Run one update's forward and backward passes; gradients end as sum / global count in the model's buffers.

    Args:
        model: the student inside Megatron's DistributedDataParallel.
        micro_batches: this rank's share of the update.
        loss: sums over supervised tokens, so that the result does not depend on the split into micro-batches or ranks.

    Returns:
        The metrics of each micro-batch, on the last pipeline stage.
    """
    return _schedule(model, micro_batches, loss, forward_only=False)


@torch.no_grad()
def forward_only(
    model: torch.nn.Module, micro_batches: Sequence[MicroBatch], collect: Callable[[Tensor, MicroBatch], Any]
) -> list[Any]:
    """Run forward passes and return ``collect(hidden states, micro-batch)`` of each, on the last pipeline stage."""
    return _schedule(model, micro_batches, collect, forward_only=True, collect_non_loss_data=True)
