"""Text from an archive, by block diffusion, autoregressive or self-speculative decoding with the same weights; needs no NeMo."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_opdlm.config.generate import GenerateConfig, check_denoising_steps
from nemo_opdlm.data.collate import collate
from nemo_opdlm.data.encoding import encode_rows, resolve_chat_template
from nemo_opdlm.data.rows import PromptRow, read_rows
from nemo_opdlm.data.tokenizer import load_tokenizer, text_of
from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.megatron.rollout import RolloutEngine
from nemo_opdlm.megatron.student import StagedGPT
from nemo_opdlm.models.archive_format import Archive
from nemo_opdlm.models.conversion import open_model
from nemo_opdlm.models.method import SpecialTokens
from nemo_opdlm.models.safe_tar import ArchiveError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REMASKING = {
    "dynamic": RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC,
    "static": RemaskingStrategy.LOW_CONFIDENCE_STATIC,
    "autoregressive": RemaskingStrategy.LOW_CONFIDENCE_STATIC,
    "speculative": RemaskingStrategy.LOW_CONFIDENCE_STATIC,
}


def prompt_rows(config: GenerateConfig) -> list[PromptRow]:
    """The prompts of a configuration, from its list or its file.

    Raises:
        ValueError, OSError: the file cannot be read; one line naming file and row.
    """
    if config.prompts_file is not None:
        return read_rows(config.prompts_file)
    return [
        PromptRow(where=f"prompts[{i}]", row_id=str(i), text=text, messages=None, domain=None)
        for i, text in enumerate(config.prompts or ())
    ]


@dataclass(frozen=True)
class Generator:
    """A network, its tokenizer and what they agreed on.

    Attributes:
        network: holds the weights in the archive's precision.
        tokenizer: of the archive.
        tokens: mask, padding and end tokens, and what is never proposed.
        block_size: tokens of a block the model was trained for.
        added_rows: vocabulary rows, the last ones, that the AR original did not have.
    """

    network: StagedGPT
    tokenizer: "PreTrainedTokenizerBase"
    tokens: SpecialTokens
    block_size: int
    added_rows: int = 0

    @staticmethod
    def load(path: str | Path) -> "Generator":
        """Read a `.nemo` archive, converted or trained.

        Raises:
            ValueError, OSError: the archive is refused; one line that names it.
        """
        with open_model(path) as (network, archive):
            if archive.tokenizer is None:
                raise ArchiveError(f"{archive.source}: the archive holds no tokenizer")
            tokenizer = load_tokenizer(archive.tokenizer)
            opdlm, origin = _method_section(archive), archive.config.get("origin") or {}
            tokens = SpecialTokens.read(
                tokenizer,
                network.arch.vocab_size,
                int(opdlm["mask_token_id"]),
                (opdlm.get("rollout") or {}).get("end_token_ids"),
                origin,
            )
            added_rows = int(origin.get("added_rows") or 0)
            return Generator(network, tokenizer, tokens, int(opdlm["block_size"]), added_rows)

    def encode(
        self, rows: Sequence[PromptRow], chat_template: bool | str = "auto", openings: Sequence[str] | None = None
    ) -> list[Tensor]:
        """Token ids int64 ``[P]`` of each prompt, as training encodes them, and what its answer begins with already.

        Raises:
            ValueError: a prompt has no tokens, holds the mask token or fills the context; one line naming it.
        """
        templated = resolve_chat_template(chat_template, self.tokenizer)
        prompts = encode_rows(rows, self.tokenizer, templated=templated, openings=openings)
        for row, ids in zip(rows, prompts, strict=True):
            self._check_prompt(row, ids)
        return [torch.tensor(ids) for ids in prompts]

    def generate(
        self,
        prompts: Sequence[Tensor],
        config: GenerateConfig,
        on_progress: Callable[..., None] | None = None,
        max_new_tokens: Tensor | None = None,
    ) -> Trajectory:
        """Responses to prompts, by the mode and sampling of ``config``.

        Args:
            prompts: token ids int64 ``[P]`` each.
            config: what ``examples/generate.py`` takes.
            on_progress: of the rollout (``diffusion.sampler.rollout``).
            max_new_tokens: int64 ``[B]``, of each response; None = that of ``config``.

        Raises:
            ValueError: the sampling does not fit the model's block size.
        """
        settings = self.rollout_settings(config)
        prompt_ids, prompt_len = collate(prompts, self.tokens.pad_id)
        wanted = torch.full_like(prompt_len, config.max_new_tokens) if max_new_tokens is None else max_new_tokens
        limits = torch.minimum(self.context_len - prompt_len, wanted)
        engine = self.engine(SamplingParams(config.temperature, config.top_k, config.top_p), config.batch_size)
        device = next(self.network.parameters()).device
        from_left_to_right = {
            "autoregressive": engine.generate_autoregressive,
            "speculative": engine.generate_speculative,
        }
        decode = from_left_to_right.get(config.mode, engine.generate)
        requests = Requests(prompt_ids, prompt_len, limits, torch.arange(len(prompts)))
        return decode(requests.to(device), settings, on_progress)

    def rollout_settings(self, config: GenerateConfig) -> RolloutSettings:
        """How a configuration decodes.

        Raises:
            ValueError: it does not fit the model's block size.
        """
        block_size = config.block_size or self.block_size
        check_denoising_steps(config.denoising_steps, block_size)
        return RolloutSettings(
            block_size=block_size,
            denoising_steps=config.denoising_steps or block_size,
            remasking=RemaskingParams(_REMASKING[config.mode], config.threshold),
            mask_token_id=self.tokens.mask_token_id,
            end_token_ids=self.tokens.end_token_ids,
            seed=config.seed,
            step=0,
        )

    def engine(self, sampling: SamplingParams, batch_size: int) -> RolloutEngine:
        """Decodes with the network."""
        device = next(self.network.parameters()).device
        return RolloutEngine(self.network, sampling, self.tokens.forbidden.to(device), batch_size)

    def texts(self, trajectory: Trajectory) -> list[str]:
        """The responses as text, without special tokens."""
        return [
            text_of(self.tokenizer, row[mask], skip_special_tokens=True)
            for row, mask in zip(trajectory.token_ids, trajectory.is_response, strict=True)
        ]

    def continuations(self, trajectory: Trajectory) -> list[str]:
        """The responses as they go on behind their prompts: some tokenizers drop a space at the beginning of a text."""
        ends = trajectory.prompt_len + trajectory.response_len
        texts = []
        for row, start, end in zip(trajectory.token_ids, trajectory.prompt_len.tolist(), ends.tolist(), strict=True):
            prompt, whole = (text_of(self.tokenizer, row[:stop], skip_special_tokens=True) for stop in (start, end))
            texts.append(whole.removeprefix(prompt))
        return texts

    def pieces(self, token_ids: Tensor) -> list[str]:
        """The text of each token by itself."""
        return [text_of(self.tokenizer, [token_id]) for token_id in token_ids.tolist()]

    @property
    def context_len(self) -> int:
        """Longest row the model was trained for, prompt and response together."""
        return self.network.arch.max_position_embeddings

    def _check_prompt(self, row: PromptRow, ids: list[int]) -> None:
        if not ids:
            raise ValueError(f"{row.where}: the prompt has no tokens")
        if self.tokens.mask_token_id in ids:
            raise ValueError(f"{row.where}: the prompt contains the mask token (id {self.tokens.mask_token_id})")
        if len(ids) >= self.context_len:
            raise ValueError(
                f"{row.where}: the prompt has {len(ids)} tokens, which leaves no room for a response in the model's "
                f"context of {self.context_len}"
            )


def _method_section(archive: Archive) -> dict[str, Any]:
    opdlm: dict[str, Any] = archive.config.get("opdlm") or {}
    for key in ("mask_token_id", "block_size"):
        if opdlm.get(key) is None:
            raise ArchiveError(f"{archive.source}: the archive names no {key}: it is no model of this kind")
    return opdlm
