"""What the arms of the rollout benchmark are given: one set of weights in two networks, prompts and length limits."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.evaluation.generation import Generator
from nemo_opdlm.megatron.student import StagedGPT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Lengths of the mix are exponential with this share of the cap as their mean, as responses with a long tail are.
MEAN_SHARE = 0.3


@dataclass(frozen=True)
class Workload:
    """Prompts to answer; rows are padded on the right.

    Attributes:
        prompt_ids: int64 ``[B, P]``.
        prompt_len: int64 ``[B]``.
        limits: int64 ``[B]``, length of each response: nothing else ends one.
    """

    prompt_ids: Tensor
    prompt_len: Tensor
    limits: Tensor

    @staticmethod
    def equal(num_rows: int, prompt_len: int, new_tokens: int, vocab_size: int) -> "Workload":
        """Rows that are equally long."""
        prompts = _random_prompts(num_rows, prompt_len, vocab_size)
        return Workload(prompts, torch.full((num_rows,), prompt_len), torch.full((num_rows,), new_tokens))

    @staticmethod
    def mix(num_rows: int, prompt_len: int, cap: int, vocab_size: int) -> "Workload":
        """Prompts of half to the whole length, every remainder modulo a block; responses of many lengths up to a cap.

        Lengths are quantiles of a distribution, dealt at random: their mean does not depend on luck.
        """
        generator = torch.Generator().manual_seed(1)
        prompt_lens = torch.randint(prompt_len // 2, prompt_len + 1, (num_rows,), generator=generator)
        quantiles = (torch.arange(num_rows) + 0.5) / num_rows
        limits = (-MEAN_SHARE * cap * (1 - quantiles).log()).round().long().clamp(1, cap)
        limits = limits[torch.randperm(num_rows, generator=generator)]
        return Workload(_random_prompts(num_rows, prompt_len, vocab_size), prompt_lens, limits)

    def first(self, num_rows: int, new_tokens: int) -> "Workload":
        """A small part of it."""
        limits = self.limits[:num_rows].clamp(max=new_tokens)
        return Workload(self.prompt_ids[:num_rows], self.prompt_len[:num_rows], limits)

    @property
    def requests(self) -> Requests:
        """Its rows as our engine takes them."""
        return Requests(self.prompt_ids, self.prompt_len, self.limits, torch.arange(len(self)))

    @property
    def num_tokens(self) -> int:
        """Response tokens that are wanted."""
        return int(self.limits.sum())

    def __len__(self) -> int:
        """Number of rows."""
        return self.prompt_len.numel()


def _random_prompts(num_rows: int, prompt_len: int, vocab_size: int) -> Tensor:
    # What stands in a prompt changes no shape, hence no time.
    return torch.randint(vocab_size // 2, (num_rows, prompt_len), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Subject:
    """One model, as Megatron's network and as Hugging Face's, with the same weights in the same precision.

    Attributes:
        generator: ours, with the tokenizer's special tokens.
        reference: Hugging Face's.
        forbidden: bool ``[V]``, never proposed: every response takes its whole length.
        sampling: of the proposals, for all arms.
    """

    generator: Generator
    reference: "PreTrainedModel"
    forbidden: Tensor
    sampling: SamplingParams

    @staticmethod
    def load(folder: str | Path, dtype: torch.dtype) -> "Subject":
        """Read a Hugging Face folder twice.

        Raises:
            ValueError, OSError: it is refused; one line.
        """
        from transformers import AutoModelForCausalLM

        generator = Generator.load(folder)
        generator.network.to(dtype).eval()
        device = next(generator.network.parameters()).device
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
        _copy_vocabulary(generator.network, reference)
        forbidden = generator.tokens.forbidden.clone()
        forbidden[list(generator.tokens.end_token_ids)] = True
        reference.to(device).eval()  # type: ignore[arg-type]  # transformers wraps torch's `to` without its self
        return Subject(generator, reference, forbidden.to(device), SamplingParams(temperature=1.0))

    @property
    def device(self) -> torch.device:
        """Where both networks are."""
        return self.forbidden.device

    def settings(
        self,
        block_size: int,
        strategy: RemaskingStrategy = RemaskingStrategy.LOW_CONFIDENCE_STATIC,
        threshold: float = 0.9,
    ) -> RolloutSettings:
        """As many denoising steps as a block has tokens; without end tokens."""
        tokens = self.generator.tokens
        remasking = RemaskingParams(strategy, threshold)
        return RolloutSettings(block_size, block_size, remasking, tokens.mask_token_id, (), seed=0, step=0)


def _copy_vocabulary(network: StagedGPT, reference: "PreTrainedModel") -> None:
    """Give the reference the row of the mask token, which the conversion may have appended."""
    vocab_size = network.arch.vocab_size
    reference.resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.no_grad():
        reference.get_input_embeddings().get_parameter("weight").copy_(
            network[0].embedding.word_embeddings.weight[:vocab_size]
        )
        reference.get_output_embeddings().weight.copy_(network.head_weight()[:vocab_size])
