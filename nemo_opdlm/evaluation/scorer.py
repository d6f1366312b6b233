"""A model in one of its modes: what it writes, and how likely it holds a text that is given."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemo_opdlm.config.generate import GenerateConfig
from nemo_opdlm.diffusion.likelihood import is_exact
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.evaluation.decoding import responses
from nemo_opdlm.evaluation.generation import Generator
from nemo_opdlm.evaluation.likelihood import LogLikelihood, Text, causal_log_likelihood, diffusion_log_likelihood

#: What is told of a rollout (``diffusion.sampler.rollout``).
OnProgress = Callable[..., None]
_FROM_LEFT_TO_RIGHT = ("autoregressive", "speculative")


@dataclass(frozen=True)
class Scorer:
    """Decodes and judges in one mode.

    Attributes:
        generator: the model.
        config: mode and sampling.
        num_samples: of the block-diffusion bound, where it is not exact.
    """

    generator: Generator
    config: GenerateConfig
    num_samples: int

    @property
    def is_causal(self) -> bool:
        """Whether the mode writes, and judges, from left to right."""
        return self.config.mode in _FROM_LEFT_TO_RIGHT

    @property
    def block_size(self) -> int:
        """Tokens denoised or drafted together."""
        return self.config.block_size or self.generator.block_size

    @property
    def likelihood(self) -> str:
        """What its log-likelihoods are, in words."""
        if self.is_causal:
            return "causal, exact"
        if is_exact(self.block_size, self.num_samples):
            return f"block-diffusion bound, all states of each block of {self.block_size}"
        return (
            f"block-diffusion bound, {self.num_samples} random states for each number of masks of a block of "
            f"{self.block_size}"
        )

    def write(
        self,
        prompts: Sequence[Tensor],
        config: GenerateConfig | None = None,
        max_new_tokens: Tensor | None = None,
        on_progress: OnProgress | None = None,
    ) -> Trajectory:
        """Responses to prompts; ``config`` may change the sampling, ``max_new_tokens [B]`` each response's limit.

        Raises:
            ValueError: a prompt holds the mask token, which block diffusion would fill.
        """
        self._check_masks(prompts)
        return self.generator.generate(prompts, config or self.config, on_progress, max_new_tokens)

    def log_likelihood(self, texts: Sequence[Text]) -> LogLikelihood:
        """ln p(judged | given) of each text, or the bound on it.

        Raises:
            ValueError: a text holds the mask token, which block diffusion would judge as such.
        """
        self._check_masks([part for text in texts for part in (text.given, text.judged)])
        if self.is_causal:
            return causal_log_likelihood(self.generator, texts, self.config.batch_size)[0]
        return diffusion_log_likelihood(
            self.generator,
            texts,
            self.config.batch_size,
            block_size=self.block_size,
            num_samples=self.num_samples,
            seed=self.config.seed,
        )

    def log_likelihood_and_greedy(self, texts: Sequence[Text]) -> tuple[LogLikelihood, Tensor]:
        """The same, and bool ``[B]``: whether greedy decoding in this mode writes what is judged."""
        if self.is_causal:
            return causal_log_likelihood(self.generator, texts, self.config.batch_size)
        return self.log_likelihood(texts), self._would_write(texts)

    def _check_masks(self, rows: Sequence[Tensor]) -> None:
        tokens = self.generator.tokens
        if not self.is_causal and any(bool((row == tokens.mask_token_id).any()) for row in rows):
            name = self.generator.tokenizer.decode([tokens.mask_token_id])
            raise ValueError(
                f"a text contains the mask token {name!r}, which has another meaning in mode={self.config.mode}"
            )

    def _would_write(self, texts: Sequence[Text]) -> Tensor:
        """By decoding, once for each of the contexts: many texts of a task share theirs."""
        longest: dict[tuple[int, ...], int] = {}
        contexts = [tuple(text.given.tolist()) for text in texts]
        for context, text in zip(contexts, texts, strict=True):
            longest[context] = max(longest.get(context, 0), len(text.judged))
        greedy = replace(self.config, temperature=0.0)
        prompts = [torch.tensor(context) for context in longest]
        trajectory = self.write(prompts, greedy, torch.tensor(list(longest.values())))
        written = dict(zip(longest, responses(trajectory), strict=True))
        starts = [written[context][: len(text.judged)] for context, text in zip(contexts, texts, strict=True)]
        return torch.tensor([torch.equal(start.cpu(), text.judged) for start, text in zip(starts, texts, strict=True)])
