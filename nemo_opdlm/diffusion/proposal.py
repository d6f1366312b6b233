"""From logits to proposals: which token would stand here, how sure the network is of it, how unsure of all of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opdlm.vocab import VocabReducer, argmax, lowest_id, top_k

_INF = float("inf")
# exp() of it is 0 in fp32.
_LOG_OF_NOTHING = -200.0
_CHUNK_COLUMNS = 256


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Temperature 0 takes the most likely one; ``top_k`` 0 and ``top_p`` 1 switch a filter off.

    Raises ValueError for values outside these ranges.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, allowed, is_allowed in (
            ("temperature", "at least 0", self.temperature >= 0),
            ("top_k", "0 (off) or a positive number of tokens", self.top_k >= 0),
            ("top_p", "above 0 and at most 1 (off)", 0 < self.top_p <= 1),
        ):
            if not is_allowed:
                raise ValueError(f"{name}={getattr(self, name)}; allowed: {allowed}")


@dataclass(frozen=True)
class Proposal:
    """Proposed tokens, one for each position ``[...]``.

    Attributes:
        token_ids: int64, x ~ p_samp.
        confidence: float32, p_raw(x), without temperature or filters: a greedy proposal would otherwise always be sure.
        entropy: float32, of p_samp in nats; 0 at temperature 0.
    """

    token_ids: Tensor
    confidence: Tensor
    entropy: Tensor


class WorkingMemory:
    """Tensors as large as the logits, kept from one call of `propose` to the next.

    On a CPU fresh memory of that size costs as much as all that is computed in it.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def like(self, logits: Tensor, name: str) -> Tensor:
        """An fp32 tensor of the shape of ``logits``, with anything in it; it takes the place of the last one of that name."""
        kept, size = self._kept.get(name), logits.numel()
        if kept is None or kept.numel() < size:
            kept = self._kept[name] = torch.empty(size, dtype=torch.float32, device=logits.device)
        return kept[:size].view(logits.shape)


@torch.no_grad()
def propose(
    logits: Tensor,
    uniform: Tensor,
    params: SamplingParams,
    forbidden: Tensor,
    vocab: VocabReducer,
    memory: WorkingMemory | None = None,
) -> Proposal:
    """Draw one token per position by inverting the distribution function at one uniform number.

    The vocabulary may be sharded: every shard returns the same proposal, the one that the whole vocabulary would give
    (two tokens within rounding of each other aside), and none ever sees the logits of another.

    Where logits are NaN or +inf, or nothing is allowed, confidence and entropy are NaN and the token is the lowest
    allowed one, so that a rollout goes on and its record shows what happened.

    Args:
        logits: ``[..., V_local]``.
        uniform: in [0, 1), ``[...]``.
        params: temperature and filters. At temperature 0 the lowest of equally likely tokens is taken.
        forbidden: bool ``[V_local]``, tokens that are never proposed and count in no probability.
        vocab: which columns these are.
        memory: what to work in; None = fresh memory.
    """
    memory = memory or WorkingMemory()
    # Two tensors as large as the logits, overwritten in place, do for everything.
    logits = memory.like(logits, "logits").copy_(logits).masked_fill_(forbidden, -_INF)
    # With a largest logit of 0, weights cannot overflow, neither here nor at a tiny temperature. They stay without a
    # normaliser, because their sum is NaN where any shard has a NaN, which a maximum may swallow.
    logits -= vocab.max(logits)[..., None]
    weights = torch.exp(logits, out=memory.like(logits, "weights"))
    mass = vocab.sum(weights)
    if params.temperature == 0:
        token_ids = argmax(logits, vocab)
        entropy = torch.zeros_like(mass)
    else:
        if params.temperature != 1:
            torch.div(logits, params.temperature, out=weights).exp_()
        _filter_(weights, logits, params, vocab)
        token_ids = _draw(weights, uniform, vocab)
        entropy = _entropy_(weights, logits, params.temperature, vocab)
    confidence = vocab.take(logits, token_ids[..., None])[..., 0].exp() / mass
    is_broken = confidence.isnan()
    columns = torch.arange(vocab.start, vocab.start + forbidden.numel(), device=forbidden.device)
    return Proposal(
        torch.where(is_broken, lowest_id(columns, ~forbidden, vocab), token_ids),
        confidence,
        torch.where(is_broken, confidence, entropy),
    )


@torch.no_grad()
def log_confidence(logits: Tensor, token_ids: Tensor, forbidden: Tensor, vocab: VocabReducer) -> Tensor:
    """ln p_raw, the logarithm of `Proposal.confidence`, of given tokens ``[...]``; arguments as for `propose`."""
    logits = logits.float().masked_fill(forbidden, -_INF)
    logits -= vocab.max(logits)[..., None]
    log_weight = vocab.take(logits, token_ids[..., None])[..., 0]
    return log_weight - vocab.sum(logits.exp_()).log()


def _filter_(weights: Tensor, logits: Tensor, params: SamplingParams, vocab: VocabReducer) -> None:
    """Take away the weight of what top-k, then top-p on what is left, exclude; in the order of Hugging Face."""
    if params.top_k:
        kth = top_k(logits, params.top_k, vocab)[0][..., -1:]
        weights.masked_fill_(logits < kth, 0.0)
    if params.top_p < 1:
        weights.masked_fill_(~_nucleus(weights, params.top_p, vocab), 0.0)


def _nucleus(weights: Tensor, top_p: float, vocab: VocabReducer) -> Tensor:
    """The smallest set of most likely tokens with a mass of at least ``top_p``, bool ``[..., V_local]``; never empty.

    A token belongs to it if the tokens before it, by falling weight and rising id, have less than that mass. Without
    sorting: bisection finds the least weight in the set. Its bits are what is halved, because non-negative floats are
    ordered like the integers with the same bits; 30 halvings single out one float of [0, 1].
    """
    target = (top_p * vocab.sum(weights)).clamp(min=torch.finfo(weights.dtype).tiny)
    indicator = torch.empty_like(weights)  # written over and over: much faster than a fresh bool tensor each time

    def mass_above(weight: Tensor) -> Tensor:
        return vocab.sum(torch.gt(weights, weight[..., None], out=indicator).mul_(weights))

    low = torch.zeros_like(target, dtype=torch.int32)
    high = torch.ones_like(target).view(torch.int32)
    for _ in range(30):
        middle = (low + high) // 2
        is_enough = mass_above(middle.view(torch.float32)) < target
        low, high = torch.where(is_enough, low, middle + 1), torch.where(is_enough, middle, high)
    least = high.view(torch.float32)
    num_tied_kept = (target - mass_above(least)) / least
    rank = torch.eq(weights, least[..., None], out=indicator).cumsum(-1)  # of tied tokens on this shard, from 1
    before = vocab.gather(rank[..., -1:])[..., : vocab.shard].sum(-1, keepdim=True)
    is_tied_kept = indicator.bool() & (rank.add_(before - 1) < num_tied_kept[..., None])
    return (weights > least[..., None]) | is_tied_kept


def _draw(weights: Tensor, uniform: Tensor, vocab: VocabReducer) -> Tensor:
    """The token whose share of the summed weights holds ``uniform``, global ids ``[...]``.

    Shares nest: the number first picks a shard, then a chunk of its columns, then a column, each time going on with
    its place in the share it fell into. So only short lists are cumulated, and only the shards' masses are exchanged.
    """
    chunk_masses = _chunk_sums(weights)
    owner, uniform = _invert(vocab.gather(chunk_masses.sum(-1, keepdim=True)), uniform)
    chunk, uniform = _invert(chunk_masses, uniform)
    columns = chunk[..., None] * _CHUNK_COLUMNS + torch.arange(_CHUNK_COLUMNS, device=weights.device)
    last = weights.shape[-1] - 1
    column, _ = _invert(weights.gather(-1, columns.clamp(max=last)).masked_fill(columns > last, 0.0), uniform)
    ids = vocab.start + chunk * _CHUNK_COLUMNS + column
    return lowest_id(ids[..., None], (owner == vocab.shard)[..., None], vocab)


def _chunk_sums(weights: Tensor) -> Tensor:
    """Sums of consecutive columns; those left over are the last chunk, which may be empty."""
    num_whole, size = weights.shape[-1] // _CHUNK_COLUMNS, _CHUNK_COLUMNS
    whole, rest = weights[..., : num_whole * size], weights[..., num_whole * size :]
    return torch.cat([whole.unflatten(-1, (num_whole, size)).sum(-1), rest.sum(-1, keepdim=True)], -1)


def _invert(weights: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Of outcomes ``[..., K]`` the one whose share of [0, 1) holds ``uniform``, and the place of the number inside it.

    Rounding must neither select an outcome of weight 0 (sums in parallel may step up there) nor run past the last
    one: such outcomes are taken out of the comparison, and the threshold stays below the largest cumulated value,
    which therefore always exceeds it.
    """
    cumulated = weights.cumsum(-1).masked_fill_(weights == 0, 0.0)
    total = cumulated.amax(-1)
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    index = (cumulated > threshold[..., None]).to(torch.uint8).argmax(-1, keepdim=True)
    weight, end = weights.gather(-1, index)[..., 0], cumulated.gather(-1, index)[..., 0]
    return index[..., 0], (1 - (end - threshold) / weight).clamp(0.0, 1.0)


def _entropy_(weights: Tensor, logits: Tensor, temperature: float, vocab: VocabReducer) -> Tensor:
    """Entropy in nats of weights ``[..., V_local]``, each exp(logit / temperature) or 0; overwrites the weights.

    Logits of no weight are raised to a finite value, because 0 * -inf would be NaN.
    """
    mass = vocab.sum(weights)
    mean_logit = vocab.sum(weights.mul_(logits.clamp_(min=_LOG_OF_NOTHING * temperature))) / mass
    return (mass.log() - mean_logit / temperature).clamp(min=0.0)
