"""Block-diffusion decoding as it is published: a loop over blocks around a Hugging Face model and its cache.

A block of b tokens takes its denoising forwards and one more, which writes its keys. All rows of a batch go through their
blocks in lock-step, from a common column on: prompts are padded on the left, rows that are finished go on as padding.
Proposals and the choice of positions are this package's, drawn with the same random numbers, so that in fp32 the texts are
those of its own engine.
"""

import time
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from nemo_opdlm.benchmark.timing import wait
from nemo_opdlm.benchmark.workload import Subject, Workload
from nemo_opdlm.diffusion.proposal import Proposal, propose
from nemo_opdlm.diffusion.remasking import positions_to_reveal, quota
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.rng import Stream, uniform
from nemo_opdlm.vocab import LocalVocab


@dataclass
class Counts:
    """What a run has cost.

    Attributes:
        num_forwards: calls of the network.
        num_places: token places that went through it.
        num_useful: those that belong to a row that was not finished, prompt tokens included; stays on the device.
        model_seconds: time inside the network.
    """

    num_forwards: int = 0
    num_places: int = 0
    num_useful: Tensor | int = 0
    model_seconds: float = 0.0


@dataclass
class ReferenceLoop:
    """Answers a batch of prompts.

    Attributes:
        subject: the network.
        settings: how to decode; static remasking.
        uses_cache: keep keys and values of finished blocks; else every forward takes the whole text.
        counts: what has been spent.
    """

    subject: Subject
    settings: RolloutSettings
    uses_cache: bool = True
    counts: Counts = field(default_factory=Counts)

    @torch.no_grad()
    def answer(self, work: Workload, first_sample: int = 0) -> Tensor:
        """The tokens of all responses, one row after the other."""
        batch = _Batch(self, work, first_sample)
        for column in range(batch.first_column, batch.width, self.settings.block_size):
            if not batch.denoise(column):
                break
        return batch.responses()


class _Batch:
    """Rows on common columns: column = position + the row's offset, so that blocks begin at the same columns."""

    def __init__(self, loop: ReferenceLoop, work: Workload, first_sample: int) -> None:
        self.loop, self.settings, self.work = loop, loop.settings, work
        self.model: PreTrainedModel = loop.subject.reference
        size, device = self.settings.block_size, self.model.device
        self.prompt_len = work.prompt_len.to(device)
        starts = self.prompt_len - self.prompt_len % size
        self.first_column = int(starts.max())
        self.offset = self.first_column - starts
        self.limit_end = self.prompt_len + work.limits.to(device)
        self.width = -(-int((self.limit_end + self.offset).max()) // size) * size
        self.positions = torch.arange(self.width, device=device) - self.offset[:, None]
        in_prompt = (self.positions >= 0) & (self.positions < self.prompt_len[:, None])
        prompt_ids = work.prompt_ids.to(device).gather(1, self.positions.clamp(0, work.prompt_ids.shape[1] - 1))
        self.token_ids = torch.where(in_prompt, prompt_ids, self.settings.mask_token_id)
        self.token_ids[self.positions < 0] = 0
        self.is_masked = ~in_prompt & (self.positions >= 0)
        self.num_forwards = torch.zeros_like(self.prompt_len)
        self.samples = torch.arange(first_sample, first_sample + len(work), device=device)
        self.cache = DynamicCache(config=self.model.config) if loop.uses_cache else None
        if self.cache is not None and self.first_column > 0:
            self._forward(slice(0, self.first_column))

    def denoise(self, column: int) -> bool:
        """Fill the block at a column; whether any row goes on behind it."""
        size = self.settings.block_size
        block = slice(column, column + size)
        is_open = self.positions[:, column] < self.limit_end
        quotas = quota(size, self.settings.denoising_steps).to(is_open.device)
        for step in range(self.settings.denoising_steps):
            masked = self.is_masked[:, block] & is_open[:, None]
            if not bool(masked.any()):
                break
            logits = self._forward(slice(0, column + size) if self.cache is None else block)[:, -size:]
            if self.cache is not None:
                self.cache.crop(-size)
            self.num_forwards += masked.any(-1)
            proposal = self._proposal(logits, masked, block)
            reveal = positions_to_reveal(
                self.settings.remasking, proposal, masked, quotas[step].expand(len(masked)), lambda: torch.zeros(0)
            )
            self.token_ids[:, block] = torch.where(reveal, proposal.token_ids, self.token_ids[:, block])
            self.is_masked[:, block] &= ~reveal
        if self.cache is not None:
            self._forward(block)
        return bool((self.positions[:, column] + size < self.limit_end).any())

    def _proposal(self, logits: Tensor, masked: Tensor, block: slice) -> Proposal:
        settings, subject = self.settings, self.loop.subject
        samples, forwards = self.samples[:, None], self.num_forwards[:, None]
        numbers = uniform(settings.seed, Stream.PROPOSAL, settings.step, samples, self.positions[:, block], forwards)
        found = propose(logits[masked], numbers[masked], subject.sampling, subject.forbidden, LocalVocab())
        token_ids = torch.zeros_like(masked, dtype=torch.int64).masked_scatter(masked, found.token_ids)
        confidence, entropy = (
            torch.zeros_like(numbers).masked_scatter(masked, x) for x in (found.confidence, found.entropy)
        )
        return Proposal(token_ids, confidence, entropy)

    def _forward(self, columns: slice) -> Tensor:
        """Logits of some columns, whose keys stay in the cache."""
        size, counts = self.settings.block_size, self.loop.counts
        position_ids, block_end = (
            self.positions[:, columns],
            torch.arange(columns.start, columns.stop) // size * size + size,
        )
        keys = torch.arange(columns.stop, device=position_ids.device)
        sees = (keys < block_end.to(keys.device)[:, None]) & (keys >= self.offset[:, None, None])
        mask = torch.zeros(sees.shape, dtype=self.model.dtype, device=keys.device)
        mask = mask.masked_fill(~sees, torch.finfo(self.model.dtype).min)[:, None]
        counts.num_forwards += 1
        counts.num_places += position_ids.numel()
        is_open = position_ids[:, -size, None] < self.limit_end[:, None]
        counts.num_useful = counts.num_useful + ((position_ids >= 0) & is_open).sum()
        wait(self.model.device)
        start = time.perf_counter()
        logits: Tensor = self.model(
            input_ids=self.token_ids[:, columns],
            position_ids=position_ids.clamp(min=0),
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=self.cache is not None,
            logits_to_keep=size,
        ).logits
        wait(self.model.device)
        counts.model_seconds += time.perf_counter() - start
        return logits

    def responses(self) -> Tensor:
        """Response tokens, row after row."""
        is_response = (self.positions >= self.prompt_len[:, None]) & (self.positions < self.limit_end[:, None])
        return self.token_ids[is_response]
