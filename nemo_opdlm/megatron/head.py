"""The LM head on the rows that need it, in chunks: no tensor grows with the vocabulary times the sequence."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_opdlm.diffusion.proposal import log_confidence
from nemo_opdlm.distillation.divergence import (
    DivergenceKind,
    DivergenceSpec,
    FullTarget,
    Target,
    TopKTarget,
    token_divergence,
)
from nemo_opdlm.megatron.lean_layers import linear_of_few_rows
from nemo_opdlm.megatron.student import StagedGPT, autocast
from nemo_opdlm.megatron.vocab_parallel import TensorParallelVocab
from nemo_opdlm.vocab import LocalVocab, VocabReducer, argmax, local_columns

#: Bytes that a chunk's tensors may take at their peak: few enough on a CPU that the logits stay near its caches.
CHUNK_BYTES = {"cpu": 112 * 2**20, "cuda": 3 * 2**30}


def bytes_per_logit(spec: DivergenceSpec) -> int:
    """Bytes alive at the peak of a chunk for each of its logits, gradient and teacher's logits included; as measured."""
    if spec.kind is DivergenceKind.nll:
        return 17
    if spec.top_k:
        return 22 if spec.kind is DivergenceKind.jsd else 18
    kinds = DivergenceKind
    return {kinds.forward_kl: 21, kinds.reverse_kl: 38, kinds.mixed: 47, kinds.jsd: 72}[spec.kind]


#: Rows up to which a product that has to be transposed afterwards is the faster one.
_FEW_ROWS = 12


class LMHead:
    """Logits of gathered hidden rows, with the vocabulary's padding rows at -inf.

    Args:
        model: the network whose head is read in place.
        adds_in_place: a loss adds the head's gradient to Megatron's fp32 buffer itself, without one of its own beside it.
            Autograd then has none for DDP's hooks to wait for, so gradients must not be reduced while others are computed.
    """

    def __init__(self, model: StagedGPT, *, adds_in_place: bool = False) -> None:
        self.model = model
        self.adds_in_place = adds_in_place
        tp_size = model.parallel.tp_size
        #: Logits are this rank's columns of the vocabulary; only the reducer knows of the others.
        self.vocab: VocabReducer = LocalVocab()
        if tp_size > 1:
            width = model.arch.padded_vocab_size(tp_size) // tp_size
            self.vocab = TensorParallelVocab(model.parallel.groups.tp, width)

    def chunk_rows(self, spec: DivergenceSpec) -> int:
        """Rows of logits to compare at a time, for `CHUNK_BYTES` at their peak."""
        weight = self.model.head_weight()
        return max(1, CHUNK_BYTES[weight.device.type] // (bytes_per_logit(spec) * weight.shape[0]))

    def gradient_buffer(self) -> Tensor | None:
        """Megatron's buffer of the head's gradient, where losses add to it themselves."""
        buffer: Tensor | None = getattr(self.model.head_weight(), "main_grad", None) if self.adds_in_place else None
        return buffer

    @property
    def dtype(self) -> torch.dtype:
        """What the head multiplies in."""
        return self.model.options.autocast_dtype or self.model.head_weight().dtype

    def shared(self, hidden: Tensor) -> Tensor:
        """Hidden states for every shard of the vocabulary, whose gradients are added up."""
        out: Tensor = copy_to_tensor_model_parallel_region(hidden, group=self.model.parallel.groups.tp)
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[T, hidden]`` -> fp32 logits ``[T, V_local]``."""
        return self.narrow_logits(hidden).float().contiguous()

    def narrow_logits(self, hidden: Tensor) -> Tensor:
        """The same in the dtype that the head multiplies in, with whichever dimension contiguous."""
        # Targets and evaluations also ask outside of a forward pass and its autocast.
        with autocast(self.model.options.autocast_dtype, hidden.device):
            return self.project(self.shared(hidden), self.model.head_weight())

    def project(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Logits ``[T, V_local]`` of hidden states that all shards share, with the head's weight in whatever dtype: theirs."""
        few_rows = hidden.dim() == 2 and hidden.shape[0] <= _FEW_ROWS
        multiplies_few = few_rows and not hidden.is_cuda and hidden.dtype == torch.float32
        logits = (linear_of_few_rows if multiplies_few else F.linear)(hidden, weight)
        num_real = self.model.arch.vocab_size - self.vocab.start
        if num_real < logits.shape[-1]:
            logits[..., max(num_real, 0) :] = -torch.inf
        return logits


@dataclass(frozen=True)
class RevealedTokens:
    """What the rollout wrote at G of the supervised tokens, whose states its network has seen as training sees them.

    Attributes:
        rows: int64 ``[G]`` their places among the supervised tokens, rising; on the CPU, so that cutting waits for no device.
        token_ids: int64 ``[G]``.
        confidence: fp32 ``[G]``, as the trajectory recorded it.
        forbidden: bool ``[V]``, tokens that the rollout gave no probability.
    """

    rows: Tensor
    token_ids: Tensor
    confidence: Tensor
    forbidden: Tensor

    def within(self, start: int, stop: int) -> "RevealedTokens":
        """Those of the supervised tokens ``start .. stop - 1``, counted from ``start``."""
        first, last = torch.searchsorted(self.rows, torch.tensor([start, stop])).tolist()
        part = slice(first, last)
        return RevealedTokens(self.rows[part] - start, self.token_ids[part], self.confidence[part], self.forbidden)

    @torch.no_grad()
    def logprob_gap(self, logits: Tensor, vocab: VocabReducer) -> Tensor:
        """|ln p in these logits ``[T, V_local]`` - ln p in the rollout|, ``[G]``."""
        forbidden = local_columns(self.forbidden, logits.shape[-1], vocab)
        found = log_confidence(logits[self.rows.to(logits.device)], self.token_ids, forbidden, vocab)
        return (found - self.confidence.log()).abs()


@dataclass(frozen=True)
class TokenLosses:
    """What T supervised tokens cost; only ``loss_sum`` has a gradient.

    Attributes:
        loss_sum: weighted sum of the divergences.
        divergence: ``[T]``.
        agrees: bool ``[T]``, whether student and target agree on the best token.
        logprob_gap: ``[G]``, that of the revealed tokens.
    """

    loss_sum: Tensor
    divergence: Tensor
    agrees: Tensor
    logprob_gap: Tensor


def _best_token(target: Target, vocab: VocabReducer) -> Tensor:
    """The target's most likely token of each row, ``[T]``."""
    if isinstance(target, FullTarget):
        return argmax(target.logits, vocab)
    return target.token_ids[:, 0] if isinstance(target, TopKTarget) else target.token_ids


@dataclass(frozen=True)
class _Chunks:
    """How one chunk of logits becomes losses and, where asked for, the gradient of their weighted sum."""

    head: LMHead
    token_weights: Tensor
    target_of: Callable[[int, int], Target]
    spec: DivergenceSpec
    revealed: RevealedTokens | None

    def losses(self, logits: Tensor, start: int, with_gradient: bool) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Divergence, agreement and gap of the tokens from ``start`` on, and the gradient of their loss in the logits."""
        stop, vocab = start + logits.shape[0], self.head.vocab
        target = self.target_of(start, stop)
        gradient = None
        with torch.set_grad_enabled(with_gradient):
            divergence = token_divergence(logits.requires_grad_(with_gradient), target, self.spec, vocab)
            if with_gradient:
                (gradient,) = torch.autograd.grad((divergence * self.token_weights[start:stop]).sum(), logits)
        logits, divergence = logits.detach(), divergence.detach()
        agrees = _best_token(target, vocab) == argmax(logits, vocab)
        if self.revealed is None:
            return (divergence, agrees, logits.new_empty(0)), gradient
        return (divergence, agrees, self.revealed.within(start, stop).logprob_gap(logits, vocab)), gradient


class _ChunkedLoss(torch.autograd.Function):
    """Weighted sum of divergences whose gradients are ready with their values: no chunk's logits are computed twice.

    Kept for the backward pass, which only scales them: the gradients of the hidden states and of the head. A gradient that
    goes straight to Megatron's buffer is not scaled: sums per token are, once, when all micro-batches are done, and there is
    no loss scale without fp16.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head_weight: Tensor, chunks: _Chunks
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        of_hidden, of_head = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format) if of_hidden else None
        # Added up in fp32 over the chunks, whatever the head multiplies in.
        buffer = grad_head = chunks.head.gradient_buffer() if of_head else None
        if of_head and grad_head is None:
            grad_head = torch.zeros_like(head_weight, dtype=torch.float32)
        parts, num_rows = [], chunks.head.chunk_rows(chunks.spec)
        with torch.autocast(hidden.device.type, enabled=False):
            weight = head_weight.to(chunks.head.dtype)
            # At least one, possibly empty: every collective and every gradient is there without supervised tokens, too.
            for start in range(0, max(1, hidden.shape[0]), num_rows):
                rows = hidden[start : start + num_rows].to(weight.dtype)
                part, gradient = chunks.losses(
                    chunks.head.project(rows, weight).float().contiguous(), start, of_hidden or of_head
                )
                parts.append(part)
                if gradient is None:
                    continue
                gradient = gradient.to(weight.dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + rows.shape[0]] = gradient @ weight
                if grad_head is not None:
                    _add_product(grad_head, gradient.T, rows)
                del gradient  # or it would live beside the next chunk
        ctx.gradients = grad_hidden, None if buffer is not None else grad_head
        divergence, agrees, logprob_gap = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.mark_non_differentiable(divergence, agrees, logprob_gap)
        return (divergence * chunks.token_weights).sum(), divergence, agrees, logprob_gap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, *_: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        assert ctx.gradients is not None, "the gradients of a head were handed over before"
        # Scaled in place: the head's is one of the largest tensors there are.
        grad_hidden, grad_head = (None if gradient is None else gradient.mul_(scale) for gradient in ctx.gradients)
        ctx.gradients = None
        return grad_hidden, grad_head, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` in the dtype of ``total``; narrower factors are multiplied in their own."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def token_losses(
    head: LMHead,
    hidden: Tensor,
    target_of: Callable[[int, int], Target],
    spec: DivergenceSpec,
    weights: Tensor,
    revealed: RevealedTokens | None = None,
) -> TokenLosses:
    """Divergence of ``hidden [T, hidden]`` from its targets, one chunk of logits at a time.

    Nothing of size ``[T, V]`` outlives its chunk. With gradients, one fp32 tensor of the size of the head's weight lives
    from here to the backward pass, which can run once; none where the head ``adds_in_place``.

    Args:
        head: the student's head.
        hidden: gathered rows at supervised positions.
        target_of: (start, stop) -> the targets of those rows.
        spec: divergence, support and tail.
        weights: fp32 ``[T]`` of the divergences in the sum.
        revealed: tokens to compare with the rollout; None for none.
    """
    weight, shared = head.model.head_weight(), head.shared(hidden)
    if not torch.is_grad_enabled():
        weight, shared = weight.detach(), shared.detach()
    return TokenLosses(*_ChunkedLoss.apply(shared, weight, _Chunks(head, weights, target_of, spec, revealed)))
