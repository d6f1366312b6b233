"""The method's settings as the pure packages want them, from the schema's keys and the model's tokenizer."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_opdlm.config import ModelConfig, OPDLMConfig
from nemo_opdlm.data.tokenizer import forbidden_ids, resolve_end_token_ids
from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.distillation.curriculum import (
    LengthSchedule,
    Ramp,
    ThresholdSchedule,
    confidence_threshold,
    rollout_length,
)
from nemo_opdlm.distillation.divergence import DivergenceKind, DivergenceSpec, Tail
from nemo_opdlm.megatron.rollout import RolloutEngine
from nemo_opdlm.megatron.student import StagedGPT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class SpecialTokens:
    """What the method has to know of a tokenizer.

    Attributes:
        mask_token_id: stands at positions that are not decoded yet.
        pad_id: fills batches; never read by a loss or a mask.
        end_token_ids: end a response.
        forbidden: bool ``[V]``, never proposed.
    """

    mask_token_id: int
    pad_id: int
    end_token_ids: tuple[int, ...]
    forbidden: Tensor

    @staticmethod
    def read(
        tokenizer: "PreTrainedTokenizerBase",
        vocab_size: int,
        mask_token_id: int,
        end_token_ids: Iterable[int] | None,
        origin: Mapping[str, Any],
    ) -> "SpecialTokens":
        """Collect them for a model.

        Args:
            tokenizer: of the model.
            vocab_size: true rows of the vocabulary.
            mask_token_id: of the model.
            end_token_ids: None = the tokenizer's and those of the model's generation defaults.
            origin: what the archive remembers of the converted model.

        Raises:
            ValueError: an id lies outside the vocabulary, or the mask token has another role.
        """
        if end_token_ids is None:
            # Chat models name further end tokens in their generation defaults only.
            named = (origin.get("generation_config") or {}).get("eos_token_id")
            more = named if isinstance(named, list) else [] if named is None else [named]
            end_token_ids = {*resolve_end_token_ids(tokenizer), *more}
        ends, pad_id = tuple(sorted(end_token_ids)), tokenizer.pad_token_id
        forbidden = forbidden_ids(tokenizer, vocab_size, mask_token_id, pad_id, end_token_ids=ends)
        return SpecialTokens(mask_token_id, 0 if pad_id is None else int(pad_id), ends, forbidden)


@dataclass(frozen=True)
class Method:
    """Everything of ``model.opdlm`` that changes with the rollout step or meets a tensor.

    Attributes:
        config: the method's keys.
        seed: key of all randomness.
        tokens: special tokens of the model.
        context_len: longest row the model was trained for, in tokens.
        num_rollout_steps: rollout steps of the whole run, the default end of a threshold ramp.
    """

    config: OPDLMConfig
    seed: int
    tokens: SpecialTokens
    context_len: int
    num_rollout_steps: int

    @staticmethod
    def of(config: ModelConfig, tokens: SpecialTokens, context_len: int, max_steps: int) -> "Method":
        """The method of a run of ``max_steps`` updates."""
        num_rollout_steps = max(1, -(-max_steps // config.updates_per_rollout))
        return Method(config.opdlm, config.seed, tokens, context_len, num_rollout_steps)

    @property
    def mask_token_id(self) -> int:
        """Id of the mask token."""
        return self.tokens.mask_token_id

    @property
    def pad_id(self) -> int:
        """Id that fills batches."""
        return self.tokens.pad_id

    @property
    def divergence(self) -> DivergenceSpec:
        """Divergence, support and tail of the training loss."""
        config = self.config
        return DivergenceSpec(
            DivergenceKind(config.divergence),
            config.reverse_kl_weight,
            config.jsd_alpha,
            config.divergence_top_k,
            Tail(config.tail),
        )

    def threshold(self, rollout_step: int) -> float:
        """Confidence threshold at a rollout step."""
        schedule, fixed = self.config.rollout.threshold_schedule, self.config.rollout.threshold
        if schedule.type is None:
            return fixed
        ramp_steps = schedule.ramp_steps or max(1, self.num_rollout_steps - schedule.hold_steps)
        start = fixed if schedule.start is None else schedule.start
        spec = ThresholdSchedule(start, schedule.end, schedule.hold_steps, ramp_steps, Ramp(schedule.type))
        return confidence_threshold(rollout_step, spec)

    def rollout_settings(self, rollout_step: int) -> RolloutSettings:
        """How the student decodes at a rollout step."""
        return RolloutSettings(
            block_size=self.config.block_size,
            denoising_steps=self.config.denoising_steps,
            remasking=RemaskingParams(
                RemaskingStrategy(self.config.rollout.remasking),
                self.threshold(rollout_step),
                self.config.rollout.entropy_bound,
            ),
            mask_token_id=self.mask_token_id,
            end_token_ids=self.tokens.end_token_ids,
            seed=self.seed,
            step=rollout_step,
        )

    def response_limits(self, rollout_step: int, prompt_len: Tensor, domains: list[str | None]) -> Tensor:
        """Longest response of each prompt, ``[B]``: curriculum, fixed limit, domain cap and the model's context."""
        rollout = self.config.rollout
        limits = self.context_len - prompt_len
        schedule = rollout.max_new_tokens_schedule
        if schedule.type is not None:
            spec = LengthSchedule(schedule.start, schedule.end, schedule.ramp_steps, Ramp(schedule.type))
            limits = limits.clamp(max=rollout_length(rollout_step, spec, self.config.block_size))
        if rollout.max_new_tokens is not None:
            limits = limits.clamp(max=rollout.max_new_tokens)
        caps = [(rollout.domain_caps or {}).get(domain or "", self.context_len) for domain in domains]
        return torch.minimum(limits, torch.tensor(caps, device=limits.device))

    def longest_responses(self, prompt_len: Tensor, domains: list[str | None]) -> Tensor:
        """Longest response of each prompt in the whole run, ``[B]``; schedules of lengths never fall."""
        return self.response_limits(self.num_rollout_steps, prompt_len, domains)

    def engine(
        self,
        network: StagedGPT,
        max_batch_size: int,
        sampling: SamplingParams | None = None,
        gives_up: Callable[[], bool] | None = None,
    ) -> RolloutEngine:
        """A rollout engine over a network; ``sampling`` defaults to the rollout's temperature and filters."""
        rollout = self.config.rollout
        device = next(network.parameters()).device
        return RolloutEngine(
            network,
            sampling or SamplingParams(rollout.temperature, rollout.top_k, rollout.top_p),
            self.tokens.forbidden.to(device),
            max_batch_size,
            rollout.max_batch_tokens,
            cuda_graphs=rollout.cuda_graphs is not False,
            gives_up=gives_up,
        )
