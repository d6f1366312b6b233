"""Divergence between teacher and student at one token, over the full vocabulary or the teacher's top-k ids.

The full vocabulary and every top-k tail mode are the same formula over different outcomes: a divergence is written
once, as terms over the last dimension of two tensors of log-probabilities. Only the default, the forward KL over the full
vocabulary, is written a second time, with its gradient. The vocabulary may be sharded; only the reducer knows. To add a
divergence: a member of `DivergenceKind`, its words in `_WORDS`, its terms in `_TERMS`.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemo_opdlm.distillation._checks import check, member
from nemo_opdlm.vocab import VocabReducer, top_k

_INF = math.inf


class DivergenceKind(StrEnum):
    """What is summed over the outcomes; phi is the teacher, q the student."""

    forward_kl = "forward_kl"
    reverse_kl = "reverse_kl"
    mixed = "mixed"
    jsd = "jsd"
    nll = "nll"


class Tail(StrEnum):
    """What happens to the probability outside the teacher's top-k ids."""

    partial = "partial"
    tail_bucket = "tail_bucket"
    renormalize = "renormalize"


_WORDS = {
    DivergenceKind.forward_kl: "sum phi (ln phi - ln q)",
    DivergenceKind.reverse_kl: "sum q (ln q - ln phi)",
    DivergenceKind.mixed: "(1-w) sum phi (ln phi - ln q) + w sum q (ln q - ln phi), w = {w:g}",
    DivergenceKind.jsd: "a sum phi (ln phi - ln mu) + (1-a) sum q (ln q - ln mu), mu = a phi + (1-a) q, a = {a:g}",
    DivergenceKind.nll: "-ln q at the clean token",
}
_SUPPORT = {
    Tail.partial: "the teacher's top {k} ids, nothing renormalised, no tail",
    Tail.tail_bucket: "the teacher's top {k} ids and one outcome for all others",
    Tail.renormalize: "the teacher's top {k} ids, both sides renormalised on them",
}


@dataclass(frozen=True)
class DivergenceSpec:
    """Which divergence, over which support.

    `reverse_weight` is the weight of the reverse term of `mixed`; `jsd_alpha` the teacher's share of the JSD mixture.
    `top_k` 0 means the full vocabulary, and `tail` is then without effect. Raises ValueError for contradictions and
    warns where the optimum is not the teacher.
    """

    kind: DivergenceKind = DivergenceKind.forward_kl
    reverse_weight: float = 0.5
    jsd_alpha: float = 0.5
    top_k: int = 0
    tail: Tail = Tail.tail_bucket

    def __post_init__(self) -> None:
        """Refuse what cannot be computed, warn of what should not be wanted."""
        object.__setattr__(self, "kind", member(DivergenceKind, "divergence", self.kind))
        object.__setattr__(self, "tail", member(Tail, "tail", self.tail))
        check("reverse_kl_weight", self.reverse_weight, 0 <= self.reverse_weight <= 1, "0 to 1")
        check("jsd_alpha", self.jsd_alpha, 0 < self.jsd_alpha < 1, "between 0 and 1, both excluded")
        check("divergence_top_k", self.top_k, self.top_k >= 0, "0 (full vocabulary) or a positive number of ids")
        teacherless = self.kind == DivergenceKind.nll
        check("divergence_top_k", self.top_k, not (teacherless and self.top_k), "0 with divergence='nll' (no teacher)")
        leaky = self.kind in (DivergenceKind.reverse_kl, DivergenceKind.mixed)
        if leaky and self.top_k and self.tail == Tail.partial:
            warnings.warn(
                f"divergence={self.kind.value!r} with tail='partial' does not have the teacher as its optimum: the "
                "reverse term lets up to 63 % of the top-k probability leak outside, free. Use tail='tail_bucket'.",
                stacklevel=3,
            )

    @property
    def formula(self) -> str:
        """The formula in words, to be shown at start-up: "top-k KL" means different things elsewhere."""
        terms = _WORDS[self.kind].format(w=self.reverse_weight, a=self.jsd_alpha)
        if self.kind == DivergenceKind.nll:
            return terms
        return f"{terms}, over {_SUPPORT[self.tail].format(k=self.top_k) if self.top_k else 'the full vocabulary'}"


@dataclass(frozen=True)
class FullTarget:
    """Teacher logits [T, V_local], sharded like the student's; rows without a token are -inf."""

    logits: Tensor

    def index(self, rows: Tensor | slice) -> "FullTarget":
        """The targets of some rows."""
        return FullTarget(self.logits[rows])


@dataclass(frozen=True)
class TopKTarget:
    """The teacher's K most likely ids of each row, with log-probabilities normalised over the full vocabulary.

    token_ids int64 [T, K] (global ids), log_probs [T, K], tail_log_prob [T] = ln of the probability outside them.
    """

    token_ids: Tensor
    log_probs: Tensor
    tail_log_prob: Tensor

    def index(self, rows: Tensor | slice) -> "TopKTarget":
        """The targets of some rows."""
        return TopKTarget(self.token_ids[rows], self.log_probs[rows], self.tail_log_prob[rows])

    @staticmethod
    def cat(parts: list["TopKTarget"]) -> "TopKTarget":
        """Join the targets of consecutive rows."""
        return TopKTarget(
            torch.cat([part.token_ids for part in parts]),
            torch.cat([part.log_probs for part in parts]),
            torch.cat([part.tail_log_prob for part in parts]),
        )


@dataclass(frozen=True)
class TokenTarget:
    """The clean token of each row, int64 [T] (global ids): all that `nll` needs."""

    token_ids: Tensor

    def index(self, rows: Tensor | slice) -> "TokenTarget":
        """The targets of some rows."""
        return TokenTarget(self.token_ids[rows])


Target = FullTarget | TopKTarget | TokenTarget


def token_divergence(student_logits: Tensor, target: Target, spec: DivergenceSpec, vocab: VocabReducer) -> Tensor:
    """Divergence of every row, differentiable in the student's logits [T, V_local]; returns [T].

    Computed in fp32 for every narrower dtype (in fp64 for fp64). Columns that are -inf on both sides contribute
    nothing; the forward term of an outcome the teacher excludes is 0, its reverse term +inf. Raises ValueError when the
    target is not of the kind that `spec` needs.
    """
    _check_target(target, spec)
    logits = _wide(student_logits)
    if isinstance(target, TokenTarget):
        return _log_sum_exp(logits, vocab) - vocab.take(logits, target.token_ids[:, None])[:, 0]
    if isinstance(target, FullTarget):
        if spec.kind == DivergenceKind.forward_kl:
            kl: Tensor = _ForwardKL.apply(logits, _wide(target.logits.detach()), vocab)
            return kl
        with torch.no_grad():
            log_phi = _log_softmax(_wide(target.logits), vocab)
        return vocab.sum(_terms(log_phi, _log_softmax(logits, vocab), spec))
    log_q = _top_k_log_probs(logits, target.token_ids, vocab)
    log_phi = torch.cat([target.log_probs, target.tail_log_prob[:, None]], -1).to(log_q.dtype)
    if spec.tail != Tail.tail_bucket:
        log_phi, log_q = log_phi[:, :-1], log_q[:, :-1]
    if spec.tail == Tail.renormalize:
        log_phi, log_q = log_phi.log_softmax(-1), log_q.log_softmax(-1)
    return _terms(log_phi, log_q, spec).sum(-1)


@torch.no_grad()
def top_k_target(teacher_logits: Tensor, k: int, vocab: VocabReducer) -> TopKTarget:
    """The K most likely ids of each row of teacher logits [T, V_local], most likely first.

    Every shard ends with the same ids. Of ids tied at the k-th place any may be kept: they are equally likely. Raises
    ValueError if k is not in 1..V.
    """
    logits = _wide(teacher_logits)
    rows, width = logits.shape
    check("divergence_top_k", k, k >= 1, "at least 1 for a top-k target")
    if k > width:  # only then may the whole vocabulary be too small
        size = int(vocab.sum(logits.new_ones(1, width)))
        check("divergence_top_k", k, k <= size, f"at most the {size} rows of the vocabulary")
    # NaN logits still get real ids, so that the loss can report them.
    token_ids = top_k(logits, k, vocab)[1]
    log_probs = _top_k_log_probs(logits, token_ids, vocab)
    return TopKTarget(token_ids, log_probs[:, :-1], log_probs[:, -1])


def _check_target(target: Target, spec: DivergenceSpec) -> None:
    needed = TokenTarget if spec.kind == DivergenceKind.nll else TopKTarget if spec.top_k else FullTarget
    if not isinstance(target, needed):
        # A truncated teacher under full support would make every reverse term +inf and forward terms lose their tail.
        raise ValueError(
            f"divergence={spec.kind.value!r} with divergence_top_k={spec.top_k} got a {type(target).__name__}; "
            f"allowed: {needed.__name__}"
        )
    if isinstance(target, TopKTarget) and target.token_ids.shape[-1] != spec.top_k:
        raise ValueError(
            f"divergence_top_k={spec.top_k} got a target of {target.token_ids.shape[-1]} ids; allowed: {spec.top_k}"
        )


class _ForwardKL(torch.autograd.Function):
    """sum phi (ln phi - ln q) over the full vocabulary, whose gradient q - phi is ready with its value.

    Autograd would keep twice as many tensors of the logits' size, and pass over them again.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher_logits: Tensor, vocab: VocabReducer) -> Tensor:
        phi, log_mass_phi = _softmax(teacher_logits, vocab)
        q, log_mass_q = _softmax(logits, vocab)
        terms = (teacher_logits - logits).add_((log_mass_q - log_mass_phi)[..., None])
        # An outcome that the teacher excludes contributes nothing, whatever the student makes of it.
        terms.masked_fill_(phi == 0, 0.0).mul_(phi)
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(q.sub_(phi))
        return vocab.sum(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad[..., None], None, None


def _softmax(logits: Tensor, vocab: VocabReducer) -> tuple[Tensor, Tensor]:
    """Probabilities [..., V_local] over the whole vocabulary, and the log-sum-exp [...]."""
    peak = vocab.max(logits)
    weights = (logits - peak[..., None]).exp_()
    mass = vocab.sum(weights)
    return weights.div_(mass[..., None]), peak + mass.log()


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _log_sum_exp(logits: Tensor, vocab: VocabReducer) -> Tensor:
    """Log-sum-exp over the whole vocabulary, [..., V_local] -> [...]; -inf, without gradient, over nothing but -inf."""
    peak = vocab.max(logits)
    peak = peak.masked_fill(peak == -_INF, 0.0)
    total = vocab.sum((logits - peak[..., None]).exp())
    empty = total == 0
    return (total.masked_fill(empty, 1.0).log() + peak).masked_fill(empty, -_INF)


def _log_softmax(logits: Tensor, vocab: VocabReducer) -> Tensor:
    # The normaliser of all shards meets the columns of each: without `spread` every shard would keep its own share
    # of the gradient only.
    return logits - vocab.spread(_log_sum_exp(logits, vocab))[..., None]


def _top_k_log_probs(logits: Tensor, token_ids: Tensor, vocab: VocabReducer) -> Tensor:
    """Log-probabilities of K ids and of everything else together, [T, K + 1], the same on every shard.

    The tail is a log-sum-exp over the logits outside K: ln(1 - Q) loses all digits where Q is near 1. No `spread`: the
    reduced values never meet sharded ones again.
    """
    width = logits.shape[-1]
    column = token_ids - vocab.start
    column = column.masked_fill((column < 0) | (column >= width), width)  # a spare column for ids of other shards
    inside = torch.zeros(logits.shape[0], width + 1, dtype=torch.bool, device=logits.device)
    inside = inside.scatter_(1, column, True)[:, :width]
    tail = _log_sum_exp(logits.masked_fill(inside, -_INF), vocab)
    return torch.cat([vocab.take(logits, token_ids), tail[:, None]], -1).log_softmax(-1)


def _expectation_terms(log_p: Tensor, log_ratio: Tensor) -> Tensor:
    """p * log_ratio, 0 where p is 0: masked before the product, or 0 * inf would poison the gradient."""
    p = log_p.exp()
    return p * log_ratio.masked_fill(p == 0, 0.0)


def _forward_terms(log_phi: Tensor, log_q: Tensor, spec: DivergenceSpec) -> Tensor:
    return _expectation_terms(log_phi, log_phi - log_q)


def _reverse_terms(log_phi: Tensor, log_q: Tensor, spec: DivergenceSpec) -> Tensor:
    return _expectation_terms(log_q, log_q - log_phi)


def _mixed_terms(log_phi: Tensor, log_q: Tensor, spec: DivergenceSpec) -> Tensor:
    weight = spec.reverse_weight
    if weight in (0, 1):  # a term without weight may be infinite, and 0 * inf is no 0
        return _reverse_terms(log_phi, log_q, spec) if weight else _forward_terms(log_phi, log_q, spec)
    return (1 - weight) * _forward_terms(log_phi, log_q, spec) + weight * _reverse_terms(log_phi, log_q, spec)


def _jsd_terms(log_phi: Tensor, log_q: Tensor, spec: DivergenceSpec) -> Tensor:
    # phi / mu = sigmoid(-x) / alpha and q / mu = sigmoid(x) / (1 - alpha), so mu, which may underflow, is never formed.
    alpha = spec.jsd_alpha
    nowhere = (log_phi == -_INF) & (log_q == -_INF)
    x = (log_q - log_phi).masked_fill(nowhere, 0.0) + math.log((1 - alpha) / alpha)
    teacher = _expectation_terms(log_phi, F.logsigmoid(-x) - math.log(alpha))
    student = _expectation_terms(log_q, F.logsigmoid(x) - math.log(1 - alpha))
    return alpha * teacher + (1 - alpha) * student


_TERMS: dict[DivergenceKind, Callable[[Tensor, Tensor, DivergenceSpec], Tensor]] = {
    DivergenceKind.forward_kl: _forward_terms,
    DivergenceKind.reverse_kl: _reverse_terms,
    DivergenceKind.mixed: _mixed_terms,
    DivergenceKind.jsd: _jsd_terms,
}


def _terms(log_phi: Tensor, log_q: Tensor, spec: DivergenceSpec) -> Tensor:
    return _TERMS[spec.kind](log_phi, log_q, spec)
