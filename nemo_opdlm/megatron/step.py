"""From half-masked states to one loss: micro-batches of two-stream rows and their summed divergence."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opdlm.diffusion.layout import SupervisedIndex, row_lengths, share_of_columns, two_stream_rows
from nemo_opdlm.diffusion.packing import pack
from nemo_opdlm.diffusion.state_selection import DenoisingState, revealed_from
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.distillation.divergence import DivergenceSpec, Target
from nemo_opdlm.distillation.loss import Normalization, token_weights
from nemo_opdlm.distillation.targets import TargetIndex
from nemo_opdlm.megatron.forward import LossFunction, MicroBatch, RowSplit, forward_only
from nemo_opdlm.megatron.head import LMHead, RevealedTokens, token_losses
from nemo_opdlm.megatron.parallel import ParallelContext
from nemo_opdlm.megatron.student import StagedGPT
from nemo_opdlm.megatron.teacher import TeacherTargets

#: Upper edges of the mask-ratio buckets that the divergence is reported by.
MASK_RATIOS = (0.25, 0.5, 0.75, 1.0)
#: What a micro-batch reports, sums over its supervised tokens.
SUMS = (
    *("loss_sum", "count", "divergence_sum", "agreements", "num_tokens", "logprob_gap_sum", "num_revealed"),
    *("ar_divergence_sum", "num_ar_tokens"),
    *(f"{name}_{upper}" for upper in MASK_RATIOS for name in ("divergence_sum", "num_tokens")),
)
#: What it reports beside them, maxima that are at least 0.
MAXIMA = ("logprob_gap_max",)


@dataclass(frozen=True)
class Supervision:
    """Where and how a micro-batch is supervised; M supervised tokens, S of states in row-major order, then causal ones.

    Attributes:
        row, column: ``[M]`` their places in the two-stream rows.
        target: ``[M]`` numbers of their targets in ``targets``.
        weight: fp32 ``[M]`` weight of each divergence.
        mask_ratio: fp32 ``[S]`` masked share of the token's block.
        count: what the summed loss is divided by, this micro-batch's share.
        targets: the rollout batch's teacher targets.
        revealed: supervised tokens to compare with the rollout; None for none.
    """

    row: Tensor
    column: Tensor
    target: Tensor
    weight: Tensor
    mask_ratio: Tensor
    count: Tensor
    targets: TeacherTargets
    revealed: RevealedTokens | None

    def targets_of(self, start: int, stop: int) -> Target:
        """Targets of supervised tokens ``start .. stop - 1``."""
        return self.targets.at(self.target[start:stop])


def micro_batches(
    trajectory: Trajectory,
    states: DenoisingState,
    targets: TeacherTargets,
    rows: Tensor,
    normalization: Normalization,
    micro_batch_size: int,
    split: RowSplit = RowSplit(),  # noqa: B008 (frozen)
    forbidden: Tensor | None = None,
    pack_to_tokens: int | None = None,
    ar_loss_weight: float = 0.0,
) -> list[MicroBatch]:
    """Cut ``rows`` of a rollout batch into micro-batches, so that little is padded.

    Either of ``micro_batch_size`` rows of similar length, or of as many rows as fit into ``pack_to_tokens`` end to end.
    Neither the cut, the order nor the split changes the loss: it is a sum over tokens divided by one global count.

    Where the states are visited ones and the weights still those of the rollout, ``forbidden`` (bool ``[V]``, tokens that
    the rollout gave no probability) lets the loss also compare the probabilities of training and rollout.

    The causal tokens of a response weigh together ``ar_loss_weight`` times as much as the tokens of its states do.

    Raises:
        ValueError: a row has more than ``pack_to_tokens``.
    """
    if rows.numel() == 0:
        return []
    trajectory_rows, state_rows = trajectory.index(rows), states.index(rows)
    if pack_to_tokens is None:
        lengths = trajectory_rows.prompt_len + trajectory_rows.response_len
        parts = rows[lengths.argsort(stable=True)].split(micro_batch_size)
    else:
        lengths = row_lengths(trajectory_rows, state_rows, ar_loss_weight > 0)
        capacity = pack_capacity(pack_to_tokens, int(lengths.max()), split.multiple_of)
        parts = tuple(rows[numbers] for numbers in pack(lengths, capacity))
    index = TargetIndex(trajectory.prompt_len, trajectory.response_len)
    is_packed = pack_to_tokens is not None
    return [
        _micro_batch(
            trajectory.index(part),
            states.index(part),
            targets,
            index,
            part,
            normalization,
            split,
            forbidden,
            is_packed,
            ar_loss_weight,
        )
        for part in parts
    ]


def pack_capacity(pack_to_tokens: int, longest: int, multiple_of: int) -> int:
    """Tokens of a pack before it is padded to a multiple of ``multiple_of``.

    Raises:
        ValueError: a row of ``longest`` tokens does not fit.
    """
    capacity = pack_to_tokens // multiple_of * multiple_of
    if longest > capacity:
        raise ValueError(
            f"model.opdlm.pack_to_tokens={pack_to_tokens} cannot hold a row of {longest} tokens "
            f"(prompt, response and its states); it must be at least {-(-longest // multiple_of) * multiple_of}, or null"
        )
    return capacity


def _micro_batch(
    trajectory: Trajectory,
    states: DenoisingState,
    targets: TeacherTargets,
    index: TargetIndex,
    rollouts: Tensor,
    normalization: Normalization,
    split: RowSplit,
    forbidden: Tensor | None,
    is_packed: bool,
    ar_loss_weight: float,
) -> MicroBatch:
    multiple_of = 1 if is_packed else split.multiple_of
    two_stream = two_stream_rows(trajectory, states, multiple_of, has_causal_copy=ar_loss_weight > 0)
    if is_packed:
        two_stream = two_stream.packed(split.multiple_of)
    if split.num_ranks > 1:
        mine = share_of_columns(two_stream.token_ids.shape[1], split.rank, split.num_ranks)
        two_stream = two_stream.columns(mine.to(rollouts.device))
    weights, count = token_weights(states.loss_mask, states.num_states, normalization)
    supervised, causal = two_stream.supervised_index, two_stream.causal_index
    _, _, document, copy, position = supervised
    of_response = ar_loss_weight * weights.sum((1, 2)) / trajectory.response_len
    supervision = Supervision(
        row=torch.cat([supervised.row, causal.row]),
        column=torch.cat([supervised.column, causal.column]),
        target=torch.cat([index.rows(rollouts[part.document], part.position) for part in (supervised, causal)]),
        weight=torch.cat([weights[document, copy, position], of_response[causal.document]]),
        mask_ratio=_mask_ratio(states.loss_mask, trajectory.block_size)[document, copy, position],
        # Of the ranks that share the rows, one counts them.
        count=count * (split.rank == 0),
        targets=targets,
        revealed=None if forbidden is None else _revealed(trajectory, states, supervised, forbidden),
    )
    return MicroBatch(two_stream.token_ids, two_stream.attributes, supervision)


def _revealed(
    trajectory: Trajectory, states: DenoisingState, index: SupervisedIndex, forbidden: Tensor
) -> RevealedTokens:
    """Those of the supervised tokens at ``index`` that the forward revealed which saw their state."""
    is_revealed = revealed_from(trajectory, states)[index.document, index.copy, index.position]
    places = index.document[is_revealed], index.position[is_revealed]
    rows = is_revealed.nonzero()[:, 0].cpu()
    return RevealedTokens(rows, trajectory.token_ids[places], trajectory.confidence[places], forbidden)


def _mask_ratio(loss_mask: Tensor, block_size: int) -> Tensor:
    """Supervised share of each position's block, fp32 like ``loss_mask [B, C, L]``."""
    blocks: Tensor = loss_mask.unflatten(-1, (-1, block_size)).float().mean(-1)
    return blocks.repeat_interleave(block_size, dim=-1)


def distillation_loss(head: LMHead, spec: DivergenceSpec) -> LossFunction:
    """The loss of one micro-batch: sum of weight x divergence over its supervised tokens, and its share of the count."""

    def loss(hidden: Tensor, batch: MicroBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        supervision: Supervision = batch.payload
        rows = hidden[supervision.row, supervision.column]
        tokens = token_losses(head, rows, supervision.targets_of, spec, supervision.weight, supervision.revealed)
        num_states, gap = supervision.mask_ratio.numel(), tokens.logprob_gap
        divergence, of_causal = tokens.divergence[:num_states], tokens.divergence[num_states:]
        sums = {
            "loss_sum": tokens.loss_sum.detach(),
            "count": supervision.count,
            "divergence_sum": divergence.sum(),
            "agreements": tokens.agrees[:num_states].sum(),
            "num_tokens": torch.tensor(divergence.numel()),
            "ar_divergence_sum": of_causal.sum(),
            "num_ar_tokens": torch.tensor(of_causal.numel()),
            "logprob_gap_sum": gap.sum(),
            "num_revealed": torch.tensor(gap.numel()),
            "logprob_gap_max": gap.max() if gap.numel() else gap.sum(),
        }
        lower = 0.0
        for upper in MASK_RATIOS:
            within = (supervision.mask_ratio > lower) & (supervision.mask_ratio <= upper)
            sums[f"divergence_sum_{upper}"], sums[f"num_tokens_{upper}"] = divergence[within].sum(), within.sum()
            lower = upper
        return tokens.loss_sum, supervision.count.to(torch.int), sums

    return loss


def total(parts: list[dict[str, Tensor]], parallel: ParallelContext) -> dict[str, float]:
    """`SUMS` and `MAXIMA` over all micro-batches and data ranks, on every rank; ``parts`` is read on the last stage."""
    sums, maxima = (torch.zeros(len(names), dtype=torch.float64, device=parallel.device) for names in (SUMS, MAXIMA))
    for part in parts:
        sums += torch.stack([part[name].to(sums) for name in SUMS])
        maxima = maxima.maximum(torch.stack([part[name].to(sums) for name in MAXIMA]))
    values = torch.cat([parallel.sum_over_data(sums), parallel.max_over_data(maxima)])
    return dict(zip(SUMS + MAXIMA, parallel.from_last_stage(values).tolist(), strict=True))


@torch.no_grad()
def divergence_sums(
    student: StagedGPT,
    trajectory: Trajectory,
    states: DenoisingState,
    targets: TeacherTargets,
    rows: Tensor,
    spec: DivergenceSpec,
    micro_batch_size: int,
) -> list[dict[str, Tensor]]:
    """What `total` adds up, for the states of some rollouts and without gradients."""
    split = RowSplit.whole(student)
    batches = micro_batches(trajectory, states, targets, rows, Normalization.token, micro_batch_size, split)
    loss = distillation_loss(LMHead(student), spec)
    return forward_only(student, batches, lambda hidden, batch: loss(hidden, batch)[2])
