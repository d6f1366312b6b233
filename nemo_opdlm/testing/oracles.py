"""The method as slow, obvious loops over Python lists, from its equations; only names and random numbers are shared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.diffusion.trajectory import NEVER_UNMASKED, FinishReason
from nemo_opdlm.rng import Stream, uniform


@dataclass(frozen=True)
class OracleToken:
    """A token of a two-stream row: its id, its stream (0 = prompt and clean, s = copy s) and absolute position."""

    token_id: int
    stream: int
    position: int


def oracle_row(
    clean: Sequence[int], states: Sequence[Sequence[int]], prompt_len: int, response_len: int, block_size: int
) -> list[OracleToken]:
    """``[prompt | clean | state x c]`` from canvases of absolute positions."""
    remainder = prompt_len % block_size
    prefix = prompt_len - remainder
    stream = block_size * math.ceil((remainder + response_len) / block_size)
    row = [OracleToken(clean[position], 0, position) for position in range(prefix + stream)]
    for copy, state in enumerate(states, start=1):
        row += [OracleToken(state[position], copy, position) for position in range(prefix, prefix + stream)]
    return row


def oracle_may_attend(query: OracleToken, key: OracleToken, block_size: int) -> bool:
    """The block-diffusion mask inside one document."""
    query_block, key_block = query.position // block_size, key.position // block_size
    if query.stream == 0:
        return key.stream == 0 and key_block <= query_block
    if key.stream == 0:
        return key_block < query_block
    return key.stream == query.stream and key_block == query_block


def oracle_masked_sets(
    unmask_step: Sequence[int], prompt_len: int, response_len: int, block_size: int
) -> dict[int, list[frozenset[int]]]:
    """The states of each block, by its first position: the sets of positions that are masked, most masked first."""
    states: dict[int, list[frozenset[int]]] = {}
    end = prompt_len + response_len
    for start in range(prompt_len - prompt_len % block_size, end, block_size):
        block = range(start, start + block_size)
        events = sorted({unmask_step[i] for i in block if prompt_len <= i < end})
        states[start] = [frozenset(i for i in block if unmask_step[i] >= event) for event in events]
    return states


def oracle_probabilities(logits: Sequence[float], params: SamplingParams, forbidden: Sequence[bool]) -> list[float]:
    """p_samp: forbidden tokens out, temperature, top-k (ties of the k-th stay), top-p."""
    allowed = [token for token, is_forbidden in enumerate(forbidden) if not is_forbidden]
    if params.temperature == 0:
        best = max(allowed, key=lambda token: (logits[token], -token))
        return [float(token == best) for token in range(len(logits))]
    kept = {token: logits[token] / params.temperature for token in allowed}
    if params.top_k:
        kth = sorted(kept.values(), reverse=True)[: params.top_k][-1]
        kept = {token: logit for token, logit in kept.items() if logit >= kth}
    probabilities = _softmax(kept)
    nucleus: dict[int, float] = {}
    for token in sorted(kept, key=lambda token: (-kept[token], token)):
        if nucleus and params.top_p < 1 and sum(probabilities[i] for i in nucleus) >= params.top_p:
            break
        nucleus[token] = kept[token]
    probabilities = _softmax(nucleus)
    return [probabilities.get(token, 0.0) for token in range(len(logits))]


def _softmax(logits: dict[int, float]) -> dict[int, float]:
    top = max(logits.values())
    weights = {token: math.exp(logit - top) for token, logit in logits.items()}
    total = sum(weights.values())
    return {token: weight / total for token, weight in weights.items()}


@dataclass(frozen=True)
class OracleProposal:
    """What is proposed at one position."""

    token_id: int
    confidence: float
    entropy: float


def oracle_propose(
    logits: Sequence[float], uniform_number: float, params: SamplingParams, forbidden: Sequence[bool]
) -> OracleProposal:
    """Walk along the distribution function until it exceeds the uniform number."""
    probabilities = oracle_probabilities(logits, params, forbidden)
    possible = [token for token, probability in enumerate(probabilities) if probability > 0]
    chosen, cumulated = possible[-1], 0.0
    for token in possible:
        cumulated += probabilities[token]
        if cumulated > uniform_number:
            chosen = token
            break
    raw = oracle_probabilities(logits, SamplingParams(), forbidden)
    entropy = -sum(p * math.log(p) for p in probabilities if p > 0)
    return OracleProposal(chosen, raw[chosen], entropy)


def oracle_quota(block_size: int, denoising_steps: int) -> list[int]:
    """n_s = floor(b / S), plus 1 in the first b mod S steps."""
    return [block_size // denoising_steps + int(s < block_size % denoising_steps) for s in range(denoising_steps)]


def oracle_reveal(
    params: RemaskingParams, proposals: dict[int, OracleProposal], quota: int, random: dict[int, float]
) -> set[int]:
    """The masked positions (the keys) to reveal, by the table of strategies."""
    quota = min(max(quota, 1), len(proposals))
    by_confidence = sorted(proposals, key=lambda i: (-proposals[i].confidence, i))
    if params.strategy == RemaskingStrategy.LOW_CONFIDENCE_STATIC:
        return set(by_confidence[:quota])
    if params.strategy == RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC:
        sure = {i for i in proposals if proposals[i].confidence > params.threshold}
        return sure if len(sure) >= quota else sure | set(by_confidence[:quota])
    if params.strategy == RemaskingStrategy.SEQUENTIAL:
        return set(sorted(proposals)[:quota])
    if params.strategy == RemaskingStrategy.RANDOM:
        return set(sorted(proposals, key=lambda i: (-random[i], i))[:quota])
    chosen: set[int] = set()
    total = 0.0
    for i in sorted(proposals, key=lambda i: (proposals[i].entropy, i)):
        total += proposals[i].entropy
        if len(chosen) >= quota and not total < params.entropy_bound:
            break
        chosen.add(i)
    return chosen


class ReferenceNetwork(Protocol):
    """A network that is asked without a cache, such as ``FakeDenoiser``."""

    params: SamplingParams

    @property
    def forbidden_mask(self) -> Tensor:
        """Tokens that are never proposed, bool ``[V]``."""
        ...

    def logits(self, token_ids: list[int], start: int) -> Tensor:
        """Logits ``[b, V]`` of the block at ``start``, given everything before it."""
        ...


@dataclass(frozen=True)
class OracleTrajectory:
    """One rollout, up to the end of its final block."""

    token_ids: list[int]
    unmask_step: list[int]
    confidence: list[float]
    response_len: int
    finish_reason: FinishReason
    num_forwards: int


def oracle_rollout(
    network: ReferenceNetwork, prompt: Sequence[int], max_new_tokens: int, sample_id: int, settings: RolloutSettings
) -> OracleTrajectory:
    """The generation loop for one prompt, every forward from scratch."""
    size, prompt_len = settings.block_size, len(prompt)
    tokens, steps, confidence = list(prompt), [0] * prompt_len, [0.0] * prompt_len
    num_forwards, start = 0, prompt_len - prompt_len % size

    def random_numbers(stream: Stream) -> dict[int, float]:
        positions = torch.arange(start, start + size)
        numbers = uniform(settings.seed, stream, settings.step, torch.tensor(sample_id), positions, num_forwards)
        return dict(zip(positions.tolist(), numbers.tolist(), strict=True))

    while True:
        new = start + size - len(tokens)
        tokens, steps = tokens + [settings.mask_token_id] * new, steps + [NEVER_UNMASKED] * new
        confidence = confidence + [0.0] * new
        for quota in oracle_quota(size, settings.denoising_steps):
            num_forwards += 1
            logits, forbidden = network.logits(tokens, start).tolist(), network.forbidden_mask.tolist()
            masked = [i for i in range(start, start + size) if steps[i] == NEVER_UNMASKED]
            random = random_numbers(Stream.PROPOSAL)
            proposals = {i: oracle_propose(logits[i - start], random[i], network.params, forbidden) for i in masked}
            for i in oracle_reveal(settings.remasking, proposals, quota, random_numbers(Stream.REMASKING)):
                tokens[i], confidence[i], steps[i] = proposals[i].token_id, proposals[i].confidence, num_forwards
            if NEVER_UNMASKED not in steps[start:]:
                break
        for i in range(max(start, prompt_len), start + size):
            response_len = i - prompt_len + 1
            if tokens[i] in settings.end_token_ids or response_len == max_new_tokens:
                is_end = tokens[i] in settings.end_token_ids
                reason = FinishReason.END_OF_TURN if is_end else FinishReason.LENGTH
                return OracleTrajectory(tokens, steps, confidence, response_len, reason, num_forwards)
        start += size
