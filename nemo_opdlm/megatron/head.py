"""The LM head on the rows that need it, in chunks: no tensor grows with the vocabulary times the sequence."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_opdlm.diffusion.proposal import log_confidence
from nemo_opdlm.distillation.divergence import DivergenceSpec, FullTarget, Target, TopKTarget, token_divergence
from nemo_opdlm.megatron.student import StagedGPT, autocast
from nemo_opdlm.megatron.vocab_parallel import TensorParallelVocab
from nemo_opdlm.vocab import LocalVocab, VocabReducer, argmax, local_columns

#: Logits alive at a time: few enough on a CPU that they stay near its caches, 512 rows of Qwen3's vocabulary on a GPU.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 512 * 151_936}


class LMHead:
    """Logits of gathered hidden rows, fp32, with the vocabulary's padding rows at -inf.

    Args:
        model: the network whose head is read in place.
    """

    def __init__(self, model: StagedGPT) -> None:
        self.model = model
        tp_size = model.parallel.tp_size
        #: Logits are this rank's columns of the vocabulary; only the reducer knows of the others.
        self.vocab: VocabReducer = LocalVocab()
        if tp_size > 1:
            width = model.arch.padded_vocab_size(tp_size) // tp_size
            self.vocab = TensorParallelVocab(model.parallel.groups.tp, width)

    @property
    def chunk_rows(self) -> int:
        """Rows of logits to hold at a time."""
        weight = self.model.head_weight()
        return max(1, CHUNK_ELEMENTS[weight.device.type] // weight.shape[0])

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states ``[T, hidden]`` -> fp32 logits ``[T, V_local]``."""
        hidden = copy_to_tensor_model_parallel_region(hidden, group=self.model.parallel.groups.tp)
        # Targets and evaluations also ask outside of a forward pass and its autocast.
        with autocast(self.model.options.autocast_dtype, hidden.device):
            logits = F.linear(hidden, self.model.head_weight()).float()
        num_real = self.model.arch.vocab_size - self.vocab.start
        if num_real < logits.shape[-1]:
            is_padding = torch.arange(logits.shape[-1], device=logits.device) >= num_real
            logits = logits.masked_fill(is_padding, float("-inf"))
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
    """Per supervised token ``[T]``: its divergence (with gradient), and whether student and target agree on the best token.

    ``logprob_gap [G]`` is that of the revealed tokens.
    """

    divergence: Tensor
    agrees: Tensor
    logprob_gap: Tensor


def _best_token(target: Target, vocab: VocabReducer) -> Tensor:
    """The target's most likely token of each row, ``[T]``."""
    if isinstance(target, FullTarget):
        return argmax(target.logits, vocab)
    return target.token_ids[:, 0] if isinstance(target, TopKTarget) else target.token_ids


def token_losses(
    head: LMHead,
    hidden: Tensor,
    target_of: Callable[[int, int], Target],
    spec: DivergenceSpec,
    revealed: RevealedTokens | None = None,
) -> TokenLosses:
    """Divergence of ``hidden [T, hidden]`` from its targets, one chunk of logits at a time.

    Backward recomputes each chunk's logits, so that nothing of size ``[T, V]`` outlives its chunk.

    Args:
        head: the student's head.
        hidden: gathered rows at supervised positions.
        target_of: (start, stop) -> the targets of those rows.
        spec: divergence, support and tail.
        revealed: tokens to compare with the rollout; None for none.
    """

    def chunk_losses(rows: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        stop = start + rows.shape[0]
        target = target_of(start, stop)
        logits = head.logits(rows)
        divergence = token_divergence(logits, target, spec, head.vocab)
        # Behind what the gradient needs, where the recomputation stops.
        agrees = _best_token(target, head.vocab) == argmax(logits.detach(), head.vocab)
        if revealed is None:
            return divergence, agrees, logits.new_empty(0)
        return divergence, agrees, revealed.within(start, stop).logprob_gap(logits.detach(), head.vocab)

    parts = []
    for start in range(0, hidden.shape[0], head.chunk_rows):
        rows = hidden[start : start + head.chunk_rows]
        if torch.is_grad_enabled():
            parts.append(checkpoint(chunk_losses, rows, start, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(chunk_losses(rows, start))
    if not parts:
        # Keeps the graph connected where a micro-batch has no supervised token, so that its backward pass still runs, and
        # gives the head the gradient without which overlapped reduction waits for ever.
        empty = head.logits(hidden).sum(-1)
        return TokenLosses(empty, torch.zeros_like(empty, dtype=torch.bool), empty.detach())
    divergence, agrees, logprob_gap = (torch.cat(column) for column in zip(*parts, strict=True))
    return TokenLosses(divergence, agrees, logprob_gap)
