"""Rollouts on the training weights: batches of prompts, by block diffusion or from left to right, on any layout."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from nemo_opdlm.diffusion.denoiser import Query
from nemo_opdlm.diffusion.masks import AttentionRule
from nemo_opdlm.diffusion.proposal import Proposal, SamplingParams, WorkingMemory
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.sampler import decode
from nemo_opdlm.diffusion.settings import RolloutProgress, RolloutSettings
from nemo_opdlm.diffusion.speculative import speculate
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.megatron import flex
from nemo_opdlm.megatron.attention import KVCache
from nemo_opdlm.megatron.cpu import without_redirect
from nemo_opdlm.megatron.denoiser import CausalDenoiser, MegatronDenoiser
from nemo_opdlm.megatron.flight import Flight, fly
from nemo_opdlm.megatron.graphs import ForwardGraphs
from nemo_opdlm.megatron.speculative import SpeculativeDenoiser
from nemo_opdlm.megatron.student import StagedGPT, autocast

#: What decides which forwards are made, as `decode` does.
Sampler = Callable[..., Generator[Query, Proposal | None, Trajectory]]


@dataclass(frozen=True)
class RolloutEngine:
    """Decodes prompts in batches with a network in place.

    Attributes:
        model: the network whose weights decode.
        sampling: temperature and filters.
        forbidden: bool ``[V]`` (true vocabulary), never proposed.
        max_batch_size: rows decoded together.
        max_batch_tokens: tokens that the cache may hold, all rows together; None = as many as the rows need.
        runs_ahead: never wait for the forward that was just launched (`decode`'s ``late_reads``), at the price of some
            tokens computed in vain; None = on a GPU.
        cuda_graphs: answer forwards from CUDA graphs where the network is whole on one GPU.
        gives_up: asked now and then whether to leave a rollout by `RolloutGivenUp`; None = never.
    """

    model: StagedGPT
    sampling: SamplingParams
    forbidden: Tensor
    max_batch_size: int
    max_batch_tokens: int | None = None
    runs_ahead: bool | None = None
    cuda_graphs: bool = True
    gives_up: Callable[[], bool] | None = None

    def generate(
        self, requests: Requests, settings: RolloutSettings, on_progress: Callable[..., None] | None = None
    ) -> Trajectory:
        """Block-diffusion rollouts; see ``diffusion.sampler.decode``."""
        return self._decode(MegatronDenoiser, AttentionRule.BLOCK_DIFFUSION, requests, settings, on_progress)

    def generate_autoregressive(
        self, requests: Requests, settings: RolloutSettings, on_progress: Callable[..., None] | None = None
    ) -> Trajectory:
        """Causal decoding with the same weights, token by token; the trajectory has the block size of ``settings``."""
        one_by_one = replace(
            settings,
            block_size=1,
            denoising_steps=1,
            remasking=RemaskingParams(RemaskingStrategy.LOW_CONFIDENCE_STATIC),
        )
        trajectory = self._decode(CausalDenoiser, AttentionRule.CAUSAL, requests, one_by_one, on_progress)
        return trajectory.with_block_size(settings.block_size)

    def generate_speculative(
        self, requests: Requests, settings: RolloutSettings, on_progress: Callable[..., None] | None = None
    ) -> Trajectory:
        """The tokens of `generate_autoregressive`, drafted by the block, and never in more forwards; see `speculate`."""
        return self._decode(SpeculativeDenoiser, AttentionRule.CAUSAL, requests, settings, on_progress, speculate)

    @torch.no_grad()
    def _decode(
        self,
        denoiser_type: type[MegatronDenoiser],
        rule: AttentionRule,
        requests: Requests,
        settings: RolloutSettings,
        on_progress: Callable[..., None] | None,
        sampler: Sampler = decode,
    ) -> Trajectory:
        batches = self._batches(requests, settings.block_size)
        report = _report_of_all(on_progress, [rows.numel() for rows, _ in batches])
        # One for all batches, which propose in turn. A GPU keeps memory itself, and a graph has its own.
        memory = None if requests.prompt_ids.is_cuda else WorkingMemory()
        flights = [
            partial(
                self._start,
                sampler,
                denoiser_type,
                requests.index(rows),
                num_slots,
                settings,
                report(number),
                memory,
            )
            for number, (rows, num_slots) in enumerate(batches)
        ]
        was_training = self.model.training
        self.model.eval()
        for chunk in self.model:
            # Transformer Engine keeps FP8 copies of the weights until it is told of an update; only schedules tell it.
            chunk.set_is_first_microbatch()
        try:
            # One region around all forwards: weights are cast once per rollout, not once per forward.
            region = autocast(self.model.options.autocast_dtype, requests.prompt_ids.device)
            with without_redirect(), self.model.on_device(), region, self.model.attention.use_rule(rule):
                trajectory = Trajectory.cat(fly(self.model, flights, self.gives_up))
        finally:
            self.model.train(was_training)
        order = torch.cat([rows for rows, _ in batches])
        return trajectory.index(order.argsort())

    def _batches(self, requests: Requests, block_size: int) -> list[tuple[Tensor, int]]:
        """Rows and number of cache slots of each batch: as many batches as the pipeline has stages.

        Raises:
            ValueError: the cache cannot hold one row.
        """
        longest = self._cache_length(requests, block_size)
        num_slots, batches = self.max_batch_size, min(self.model.parallel.pp_size, len(requests))
        if self.max_batch_tokens is not None:
            num_slots = min(num_slots, slots_that_fit(self.max_batch_tokens, batches, longest))
        rows = torch.arange(len(requests), device=requests.prompt_ids.device)
        # Dealt, not cut: rows come sorted by length, and batches in flight together should take the same time.
        return [(rows[number::batches], num_slots) for number in range(batches)]

    def _start(
        self,
        sampler: Sampler,
        denoiser_type: type[MegatronDenoiser],
        requests: Requests,
        num_slots: int,
        settings: RolloutSettings,
        on_progress: Callable[..., None] | None,
        memory: WorkingMemory | None,
    ) -> Flight:
        """A batch with a cache of its own, ready for its first forward."""
        is_cuda = requests.prompt_ids.is_cuda
        runs_ahead = is_cuda if self.runs_ahead is None else self.runs_ahead
        num_slots = min(num_slots, len(requests))
        cache = KVCache(num_slots, self._cache_length(requests, settings.block_size))
        denoiser = denoiser_type(
            self.model,
            cache,
            settings.block_size,
            settings.mask_token_id,
            self.sampling,
            self.forbidden,
            fixed_shapes=runs_ahead,
            memory=memory,
        )
        is_whole = self.model.parallel.pp_size * self.model.parallel.tp_size == 1
        has_graphs = self.cuda_graphs and is_cuda and runs_ahead and is_whole
        return Flight(
            sampler(requests, settings, on_progress, num_slots, runs_ahead),
            denoiser,
            graphs=ForwardGraphs(denoiser.answer) if has_graphs else None,
        )

    def _cache_length(self, requests: Requests, block_size: int) -> int:
        """Tokens of a cache slot that holds any of these rows, in whole blocks."""
        longest = -(-int((requests.prompt_len + requests.max_new_tokens).max()) // block_size) * block_size
        return flex.bucket(longest) if self.model.attention.uses_flex else longest


def slots_that_fit(max_batch_tokens: int, num_batches: int, longest: int) -> int:
    """Slots that each of several caches may have.

    Args:
        max_batch_tokens: tokens of all caches together.
        num_batches: caches, one for each batch in flight.
        longest: tokens of a slot.

    Raises:
        ValueError: not even one.
    """
    num_slots = max_batch_tokens // (num_batches * longest)
    if num_slots == 0:
        raise ValueError(
            f"model.opdlm.rollout.max_batch_tokens={max_batch_tokens} cannot hold {num_batches} rows of {longest} "
            f"tokens, prompt and response: at least {num_batches * longest} are needed"
        )
    return num_slots


def _report_of_all(
    on_progress: Callable[..., None] | None, num_rows: list[int]
) -> Callable[[int], Callable[[RolloutProgress], None] | None]:
    """Add up what batches that are in flight together report, as if they were one."""
    states = [
        RolloutProgress(num_forwards=0, num_row_forwards=0, num_active=n, num_rows=n, num_tokens=0) for n in num_rows
    ]

    def report_of(number: int) -> Callable[[RolloutProgress], None] | None:
        if on_progress is None:
            return None

        def report(progress: RolloutProgress) -> None:
            states[number] = progress
            on_progress({key: sum(state[key] for state in states) for key in progress})  # type: ignore[literal-required]

        return report

    return report_of
