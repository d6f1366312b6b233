"""From logits to proposals: which token would stand here, how sure the network is of it, how unsure of all of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

_INF = float("inf")


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


def propose(logits: Tensor, uniform: Tensor, params: SamplingParams, forbidden: Tensor) -> Proposal:
    """Draw one token per position by inverting the distribution function at one uniform number.

    Where logits are NaN or +inf, or nothing is allowed, confidence and entropy are NaN and the token is the lowest
    allowed one, so that a rollout goes on and its record shows what happened.

    Args:
        logits: ``[..., V]``.
        uniform: in [0, 1), ``[...]``.
        params: temperature and filters.
        forbidden: bool ``[V]``, tokens that are never proposed and count in no probability.
    """
    logits = logits.float().masked_fill(forbidden, -_INF)
    p_raw = logits.softmax(-1)
    if params.temperature == 0:
        token_ids = logits.argmax(-1)
        entropy = torch.zeros_like(uniform, dtype=torch.float32)
    else:
        p_samp = _sampling_probabilities(logits, p_raw, params)
        token_ids = _invert(p_samp, uniform)
        entropy = torch.special.entr(p_samp).sum(-1)
    confidence = p_raw.gather(-1, token_ids[..., None])[..., 0]
    is_broken = confidence.isnan()
    lowest_allowed = (~forbidden).to(torch.uint8).argmax()
    return Proposal(
        torch.where(is_broken, lowest_allowed, token_ids), confidence, torch.where(is_broken, confidence, entropy)
    )


def _sampling_probabilities(logits: Tensor, p_raw: Tensor, params: SamplingParams) -> Tensor:
    """p_samp ``[..., V]``: temperature, then top-k, then top-p on what is left, as Hugging Face orders them."""
    if params == SamplingParams():
        return p_raw
    # Shifted to a largest logit of 0, a tiny temperature cannot overflow.
    logits = (logits - logits.amax(-1, keepdim=True)) / params.temperature
    if params.top_k:
        kth = logits.topk(min(params.top_k, logits.shape[-1]), sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < kth, -_INF)
    if params.top_p < 1:
        logits = logits.masked_fill(~_nucleus(logits, params.top_p), -_INF)
    return logits.softmax(-1)


def _nucleus(logits: Tensor, top_p: float) -> Tensor:
    """The smallest set of most likely tokens with a mass of at least ``top_p``, bool ``[..., V]``; never empty."""
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = ordered.softmax(-1)
    mass_before = probabilities.cumsum(-1) - probabilities
    keep = mass_before < top_p
    return torch.zeros_like(keep).scatter(-1, order, keep)


def _invert(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """The token whose share of [0, 1) holds ``uniform``: first the cumulated probability exceeds it.

    Rounding must neither select a token of probability 0 (sums in parallel may step up there) nor run past the last
    one: such tokens are taken out of the comparison, and the threshold stays below the largest cumulated value, which
    therefore always exceeds it.
    """
    cumulated = probabilities.cumsum(-1).masked_fill_(probabilities == 0, 0.0)
    total = cumulated.amax(-1)
    threshold = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    exceeds = cumulated > threshold[..., None]
    return exceeds.to(torch.uint8).argmax(-1)
