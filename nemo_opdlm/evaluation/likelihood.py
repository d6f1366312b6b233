"""The log-likelihood of given texts: causal and exact, or by the block-diffusion bound; with the same weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_opdlm.diffusion.layout import clean_rows, two_stream_rows
from nemo_opdlm.diffusion.likelihood import LikelihoodStates, likelihood_states, num_states
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.diffusion.proposal import log_confidence
from nemo_opdlm.diffusion.trajectory import Trajectory, given_texts
from nemo_opdlm.distillation.divergence import DivergenceKind, DivergenceSpec
from nemo_opdlm.distillation.targets import TargetIndex
from nemo_opdlm.evaluation.generation import Generator
from nemo_opdlm.megatron.forward import MicroBatch, RowSplit, forward_only
from nemo_opdlm.megatron.head import LMHead
from nemo_opdlm.vocab import argmax, local_columns

#: Tokens of one pass, padding included: a text with all its states is many times as long as the text.
TOKENS_PER_PASS = 2**14
_NLL = DivergenceSpec(DivergenceKind.nll)


@dataclass(frozen=True)
class Text:
    """A text to judge.

    Attributes:
        given: int64 ``[P]``, P >= 1, its context.
        judged: int64 ``[R]``, R >= 1.
        number: key of the states drawn for it.
    """

    given: Tensor
    judged: Tensor
    number: int

    def __len__(self) -> int:
        """Tokens of both parts."""
        return len(self.given) + len(self.judged)


@dataclass(frozen=True)
class LogLikelihood:
    """What is known of ln p(judged | given), fp64 ``[B]`` in nats.

    Attributes:
        total: causal: the value; block diffusion: a lower bound.
        standard_error: of the bound where its states were drawn, else 0.
    """

    total: Tensor
    standard_error: Tensor


@torch.no_grad()
def causal_log_likelihood(generator: Generator, texts: Sequence[Text], batch_size: int) -> tuple[LogLikelihood, Tensor]:
    """The chain rule from left to right, in one pass; and bool ``[B]``, whether each judged token is the most likely one.

    A vocabulary row that the conversion added for the mask counts in no probability: the AR original has none.
    """
    network, vocab_size = generator.network, generator.network.arch.vocab_size
    excluded = torch.arange(vocab_size) >= vocab_size - generator.added_rows
    total, is_greedy = torch.zeros(len(texts), dtype=torch.float64), torch.zeros(len(texts), dtype=torch.bool)
    with network.attention.use_rule(AttentionRule.CAUSAL):
        for numbers, trajectory in _batches(generator, texts, batch_size, generator.block_size, len):
            index = TargetIndex(trajectory.prompt_len, trajectory.response_len)
            rows = MicroBatch(*clean_rows(trajectory, RowSplit.whole(network).multiple_of), payload=index)
            (hidden,) = forward_only(network, [rows], lambda hidden, batch: batch.payload.gather(hidden))
            token_ids, lengths = trajectory.token_ids[trajectory.is_response], trajectory.response_len.tolist()
            log_probs, agrees = _judge(generator, hidden, token_ids, excluded)
            total[numbers] = torch.stack([part.sum() for part in log_probs.double().split(lengths)]).cpu()
            is_greedy[numbers] = torch.stack([part.all() for part in agrees.split(lengths)]).cpu()
    return LogLikelihood(total, torch.zeros_like(total)), is_greedy


@torch.no_grad()
def diffusion_log_likelihood(
    generator: Generator, texts: Sequence[Text], batch_size: int, *, block_size: int, num_samples: int, seed: int
) -> LogLikelihood:
    """The block-diffusion bound (``diffusion.likelihood``); the mask token counts in no probability, as in decoding.

    Raises:
        ValueError: ``num_samples`` is too small to state an error.
    """
    network, mask_token_id = generator.network, generator.tokens.mask_token_id
    excluded = torch.arange(network.arch.vocab_size) == mask_token_id
    num_copies = num_states(block_size, num_samples)

    def row_len(text: Text) -> int:
        return len(text) + num_copies * (len(text.judged) + 2 * block_size)

    total, error = torch.zeros(2, len(texts), dtype=torch.float64)
    with network.attention.use_rule(AttentionRule.BLOCK_DIFFUSION):
        for numbers, trajectory in _batches(generator, texts, batch_size, block_size, row_len):
            states = likelihood_states(trajectory, mask_token_id, num_samples=num_samples, seed=seed)
            bound, of_bound = states.bound(_state_log_probs(generator, trajectory, states, excluded))
            total[numbers], error[numbers] = bound.cpu(), of_bound.cpu()
    return LogLikelihood(total, error)


def _batches(
    generator: Generator, texts: Sequence[Text], batch_size: int, block_size: int, row_len: Callable[[Text], int]
) -> Iterator[tuple[Tensor, Trajectory]]:
    """Numbers and records of texts that share a pass, longest first: not too many rows, not too many tokens."""
    mask_token_id, device = generator.tokens.mask_token_id, generator.network.parallel.device
    waiting = sorted(range(len(texts)), key=lambda number: -row_len(texts[number]))
    while waiting:
        num_rows = max(1, min(batch_size, TOKENS_PER_PASS // row_len(texts[waiting[0]])))
        numbers, waiting = waiting[:num_rows], waiting[num_rows:]
        chosen = [texts[number] for number in numbers]
        keys = torch.tensor([text.number for text in chosen])
        parts = [text.given for text in chosen], [text.judged for text in chosen]
        yield torch.tensor(numbers), given_texts(*parts, keys, mask_token_id, block_size).to(device)


def _state_log_probs(
    generator: Generator, trajectory: Trajectory, likelihood: LikelihoodStates, excluded: Tensor
) -> Tensor:
    """ln p of the text's token at each mask of its states, ``[B, C, L]``; 0 elsewhere."""
    network, states = generator.network, likelihood.states
    rows = two_stream_rows(trajectory, states, RowSplit.whole(network).multiple_of)
    index = rows.supervised_index
    batch = MicroBatch(rows.token_ids, rows.attributes)
    (hidden,) = forward_only(network, [batch], lambda hidden, _: hidden[index.row, index.column])
    token_ids = trajectory.token_ids[index.document, index.position]
    log_probs = torch.zeros(states.loss_mask.shape, device=token_ids.device)
    log_probs[index.document, index.copy, index.position] = _judge(generator, hidden, token_ids, excluded)[0]
    return log_probs


def _judge(generator: Generator, hidden: Tensor, token_ids: Tensor, excluded: Tensor) -> tuple[Tensor, Tensor]:
    """ln p of tokens ``[T]`` by hidden rows ``[T, hidden]``, and whether they are the most likely ones."""
    head = LMHead(generator.network)
    width, num_rows = head.model.head_weight().shape[0], head.chunk_rows(_NLL)
    excluded = local_columns(excluded.to(hidden.device), width, head.vocab)
    parts = []
    for rows, tokens in zip(hidden.split(num_rows), token_ids.split(num_rows), strict=True):
        logits = head.logits(rows)
        best = argmax(logits.masked_fill(excluded, float("-inf")), head.vocab)
        parts.append((log_confidence(logits, tokens, excluded, head.vocab), best == tokens))
    log_probs, agrees = (torch.cat(column) for column in zip(*parts, strict=True))
    return log_probs, agrees
