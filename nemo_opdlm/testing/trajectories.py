"""Small trajectories to test with, really rolled out by a network of hashes."""

import torch

from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.sampler import rollout
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.testing.fake_denoiser import FakeDenoiser

VOCAB_SIZE = 13
END_TOKEN_ID = 11
MASK_TOKEN_ID = 12


def fake_denoiser(block_size: int, end_bias: float = -1.0, params: SamplingParams | None = None) -> FakeDenoiser:
    """A network over this module's vocabulary; ``end_bias`` is added to the logit of the end token."""
    bias = torch.zeros(VOCAB_SIZE)
    bias[END_TOKEN_ID] = end_bias
    return FakeDenoiser(VOCAB_SIZE, block_size, MASK_TOKEN_ID, params or SamplingParams(), bias=bias)


def rollout_settings(
    block_size: int,
    strategy: RemaskingStrategy = RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC,
    denoising_steps: int | None = None,
    threshold: float = 0.5,
    seed: int = 0,
    step: int = 1,
) -> RolloutSettings:
    """Settings over this module's vocabulary, with as many denoising steps as a block has tokens by default."""
    return RolloutSettings(
        block_size=block_size,
        denoising_steps=denoising_steps or block_size,
        remasking=RemaskingParams(strategy, threshold),
        mask_token_id=MASK_TOKEN_ID,
        end_token_ids=(END_TOKEN_ID,),
        seed=seed,
        step=step,
    )


def random_requests(num_rows: int, block_size: int, seed: int = 0) -> Requests:
    """Prompts with lengths of every remainder modulo the block size, and length limits."""
    generator = torch.Generator().manual_seed(seed)
    prompt_len = 1 + torch.arange(num_rows) % (3 * block_size)
    prompt_ids = torch.randint(0, END_TOKEN_ID, (num_rows, int(prompt_len.max()) + 2), generator=generator)
    max_new_tokens = torch.randint(1, 4 * block_size + 2, (num_rows,), generator=generator)
    return Requests(prompt_ids, prompt_len, max_new_tokens, torch.arange(num_rows))


def random_trajectory(num_rows: int, block_size: int, seed: int = 0, end_bias: float = -1.0) -> Trajectory:
    """Rollouts of random prompts; some end by themselves, some at their limits."""
    settings = rollout_settings(block_size, seed=seed)
    return rollout(fake_denoiser(block_size, end_bias), random_requests(num_rows, block_size, seed), settings)
