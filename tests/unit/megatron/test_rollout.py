"""The engine's cache: bounded by what it may hold, refilled row by row, and without a say in what is written."""

import contextlib
from typing import Any

import pytest
import torch

from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.megatron import rollout
from nemo_opdlm.megatron.attention import KVCache
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.rollout import RolloutEngine
from nemo_opdlm.megatron.student import HiddenStatesGPT, ModelOptions, StagedGPT
from nemo_opdlm.testing import tiny

ROWS = 9
SETTINGS = RolloutSettings(
    block_size=4,
    denoising_steps=4,
    remasking=RemaskingParams(RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC, threshold=0.06),
    mask_token_id=tiny.MASK_TOKEN_ID,
    end_token_ids=tuple(range(30, 34)),
    seed=1,
    step=1,
)


@pytest.fixture(scope="module")
def network() -> StagedGPT:
    return tiny.random_network(tiny.architecture(), initialize())


def respond(
    network: StagedGPT, max_batch_size: int, max_batch_tokens: int | None = None, runs_ahead: bool = False
) -> Trajectory:
    """Prompts of 1 to 9 tokens, and as many responses of up to 19."""
    forbidden = torch.arange(tiny.VOCAB_SIZE) >= tiny.NUM_TOKENS
    engine = RolloutEngine(network, SamplingParams(), forbidden, max_batch_size, max_batch_tokens, runs_ahead)
    prompt_len = torch.arange(1, ROWS + 1)
    prompt_ids = torch.randint(4, 30, (ROWS, ROWS), generator=torch.Generator().manual_seed(0))
    limits = torch.arange(11, 11 + ROWS)
    return engine.generate(Requests(prompt_ids, prompt_len, limits, torch.arange(ROWS)), SETTINGS)


@pytest.mark.parametrize(("max_batch_size", "max_batch_tokens"), [(1, None), (2, None), (5, None), (9, 3 * 28 + 5)])
def test_what_is_written_does_not_depend_on_the_slots(
    max_batch_size: int, max_batch_tokens: int | None, network: StagedGPT
) -> None:
    expected, actual = respond(network, ROWS), respond(network, max_batch_size, max_batch_tokens)
    assert_equal(actual, expected)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("runs_ahead", [False, True])
def test_what_is_written_does_not_depend_on_the_kernel(
    runs_ahead: bool, network: StagedGPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = respond(network, ROWS)
    monkeypatch.setattr(network.attention, "uses_flex", True)
    # FlexAttention traces its mask with a mode of its own, which would be switched off with Megatron's redirect on a CPU.
    monkeypatch.setattr(rollout, "without_redirect", contextlib.nullcontext)
    # 9 rows of 28 tokens in slots of 128: of these the limit allows for 3.
    found = respond(network, ROWS, 3 * 128, runs_ahead)
    assert_equal(found, expected)


@pytest.mark.parametrize("max_batch_size", [1, 2, 5, 9])
def test_what_is_written_does_not_depend_on_when_the_host_is_told(max_batch_size: int, network: StagedGPT) -> None:
    assert_equal(respond(network, max_batch_size, runs_ahead=True), respond(network, ROWS))


def assert_equal(actual: Trajectory, expected: Trajectory) -> None:
    for name in ("token_ids", "unmask_step", "response_len", "finish_reason", "num_forwards", "sample_ids"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


@pytest.mark.parametrize("token_multiple", [16, 32])
def test_tokens_that_fill_up_fp8s_tiles_have_no_say(
    token_multiple: int, network: StagedGPT, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[int] = []
    forward = HiddenStatesGPT.forward

    def remember(self: HiddenStatesGPT, token_ids: torch.Tensor, *args: Any) -> torch.Tensor:
        widths.append(token_ids.numel())
        return forward(self, token_ids, *args)

    monkeypatch.setattr(HiddenStatesGPT, "forward", remember)
    expected = respond(network, 5)
    widths.clear()
    tiled = tiny.random_network(tiny.architecture(), initialize(), options=ModelOptions(token_multiple=token_multiple))
    actual = respond(tiled, 5)
    assert widths and not any(width % token_multiple for width in widths)
    for name in ("token_ids", "unmask_step", "response_len", "num_forwards"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


def test_the_cache_holds_no_more_than_allowed(network: StagedGPT, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[KVCache] = []

    def remember(*args: Any) -> KVCache:
        caches.append(KVCache(*args))
        return caches[-1]

    monkeypatch.setattr(rollout, "KVCache", remember)
    respond(network, ROWS, 3 * 28 + 5)  # the longest row takes 9 + 19 = 28 tokens
    assert [(cache.num_slots, cache.length) for cache in caches] == [(3, 28)]


def test_a_row_that_cannot_fit_is_refused_before_any_forward(network: StagedGPT) -> None:
    with pytest.raises(ValueError, match=r"max_batch_tokens=27 cannot hold 1 rows of 28 tokens.*at least 28"):
        respond(network, ROWS, 27)
