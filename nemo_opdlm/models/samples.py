"""Rollouts as text."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from nemo_opdlm.config import TokenizerConfig
from nemo_opdlm.data.tokenizer import load_tokenizer, text_of
from nemo_opdlm.diffusion.trajectory import FinishReason, Trajectory
from nemo_opdlm.lightning.samples import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_samples(
    trajectory: Trajectory, rollout_step: int, count: int, tokenizer: "PreTrainedTokenizerBase"
) -> list[Sample]:
    """The first ``count`` rollouts of a batch."""
    some = trajectory.index(slice(count)).to("cpu")
    samples = []
    for row, token_ids in enumerate(some.token_ids.tolist()):
        prompt_len, response_len = int(some.prompt_len[row]), int(some.response_len[row])
        samples.append(
            Sample(
                rollout_step=rollout_step,
                sample_id=int(some.sample_ids[row]),
                prompt=text_of(tokenizer, token_ids[:prompt_len]),
                response=text_of(tokenizer, token_ids[prompt_len : prompt_len + response_len]),
                finish_reason=FinishReason(int(some.finish_reason[row])).name.lower(),
                response_len=response_len,
                num_forwards=int(some.num_forwards[row]),
            )
        )
    return samples


def tokenizer_of(settings: TokenizerConfig, files: Mapping[str, bytes]) -> "PreTrainedTokenizerBase":
    """The tokenizer of a run, from the model's files; code of its own is only in the folder that the settings name."""
    if settings.trust_remote_code and settings.type is not None:
        return load_tokenizer(settings.type, trust_remote_code=True)
    with TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        return load_tokenizer(folder)
