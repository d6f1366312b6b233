"""Self-speculative decoding with a real network: the text of causal decoding, and drafts that see what they should."""

import pytest
import torch

from nemo_opdlm.diffusion.denoiser import Query
from nemo_opdlm.diffusion.masks import AttentionRule, TokenAttributes
from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.megatron.attention import KVCache
from nemo_opdlm.megatron.head import LMHead
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.rollout import RolloutEngine
from nemo_opdlm.megatron.speculative import SpeculativeDenoiser
from nemo_opdlm.megatron.student import StagedGPT
from nemo_opdlm.testing import tiny

ROWS = 9


@pytest.fixture(scope="module")
def network() -> StagedGPT:
    return tiny.random_network(tiny.architecture(), initialize()).eval()


def respond(
    network: StagedGPT, mode: str, num_words: int, temperature: float, num_slots: int = ROWS, runs_ahead: bool = False
) -> Trajectory:
    """Prompts of 1 to 9 tokens, and as many responses of up to 19, from ``num_words`` tokens and an end token."""
    forbidden = torch.ones(tiny.VOCAB_SIZE, dtype=torch.bool)
    forbidden[4 : 4 + num_words] = False
    forbidden[tiny.END_TOKEN_ID] = num_words == 1
    settings = RolloutSettings(
        block_size=4,
        denoising_steps=4,
        remasking=RemaskingParams(RemaskingStrategy.LOW_CONFIDENCE_STATIC),
        mask_token_id=tiny.MASK_TOKEN_ID,
        end_token_ids=(tiny.END_TOKEN_ID,),
        seed=1,
        step=1,
    )
    engine = RolloutEngine(network, SamplingParams(temperature), forbidden, num_slots, runs_ahead=runs_ahead)
    prompt_ids = torch.randint(4, 30, (ROWS, ROWS), generator=torch.Generator().manual_seed(0))
    prompt_ids[3::2, 1::2] = tiny.MASK_TOKEN_ID  # in a prompt a token like any other, also the last
    requests = Requests(prompt_ids, torch.arange(1, ROWS + 1), torch.arange(11, 11 + ROWS), torch.arange(ROWS))
    decode = {"autoregressive": engine.generate_autoregressive, "speculative": engine.generate_speculative}[mode]
    return decode(requests, settings)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("num_words", "num_slots"), [(2, ROWS), (3, 2), (30, ROWS)])
def test_the_text_is_that_of_causal_decoding_in_fewer_forwards(
    num_words: int, num_slots: int, temperature: float, network: StagedGPT
) -> None:
    """With few words to choose from, a random network's drafts are often right, and often wrong."""
    expected = respond(network, "autoregressive", num_words, temperature)
    found = respond(network, "speculative", num_words, temperature, num_slots)
    for name in ("token_ids", "prompt_len", "response_len", "finish_reason", "sample_ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    torch.testing.assert_close(found.confidence, expected.confidence, atol=1e-5, rtol=0)
    assert (found.num_forwards <= expected.num_forwards).all()
    assert found.num_forwards.sum() < expected.num_forwards.sum()
    assert (found.num_forwards >= 1 + -(-(found.response_len - 1) // 4)).all()


@pytest.mark.parametrize("num_slots", [ROWS, 2])
def test_what_is_written_does_not_depend_on_when_the_host_is_told(num_slots: int, network: StagedGPT) -> None:
    for mode in ("autoregressive", "speculative"):
        expected = respond(network, mode, 3, 1.0)
        found = respond(network, mode, 3, 1.0, num_slots, runs_ahead=True)
        for name in ("token_ids", "prompt_len", "response_len", "finish_reason", "num_forwards"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_drafts_that_cannot_be_wrong_give_a_block_per_forward(network: StagedGPT) -> None:
    found = respond(network, "speculative", num_words=1, temperature=0.0)
    assert torch.equal(found.num_forwards, 1 + -(-(found.response_len - 1) // 4))


@torch.no_grad()
def test_masks_see_the_text_the_drafts_and_each_other_and_the_text_sees_no_mask(network: StagedGPT) -> None:
    """Equal to one forward without a cache, in which every token is a block of its own and the masks are one block."""
    size, mask = 4, tiny.MASK_TOKEN_ID
    texts = [torch.arange(5, 12), torch.arange(9, 14)]
    num_drafts, num_masks = [0, 2], [4, 3]
    cache = KVCache(2, 24)
    none_forbidden = torch.zeros(tiny.VOCAB_SIZE, dtype=torch.bool)
    denoiser = SpeculativeDenoiser(network, cache, size, mask, SamplingParams(0.0), none_forbidden)
    query = Query(
        torch.arange(2),
        *(torch.zeros(2, 2 * size).long() for _ in range(2)),
        torch.zeros(2, 2 * size).bool(),
        24,
        torch.rand(2, 7),
    )
    with network.attention.use_rule(AttentionRule.CAUSAL), network.attention.use_cache(cache):
        for row, text in enumerate(texts):
            # What a draft that was not accepted has left behind must not be seen.
            stale = torch.cat([text, torch.full((24 - len(text),), 33)])[None]
            valid = torch.ones(1, 24).bool()
            denoiser.prefill(Query(torch.tensor([row]), stale, torch.arange(24)[None], valid, 24, None))
            start = len(text) - 1 - num_drafts[row]
            tokens = torch.cat([text[start:], torch.full((num_masks[row],), mask)])
            query.token_ids[row, : len(tokens)] = tokens
            query.valid[row, : len(tokens)] = True
            query.position_ids[row] = torch.where(query.valid[row], start + torch.arange(2 * size), -1)
        forward = denoiser.prepare(query)
        found = denoiser.logits(denoiser.forward(forward))
    expected = []
    for row, text in enumerate(texts):
        positions = torch.arange(len(text) + num_masks[row])[None]
        blocks = positions.clamp(max=len(text))
        tokens = torch.cat([text, torch.full((num_masks[row],), mask)])[None]
        attributes = TokenAttributes(torch.zeros_like(positions), torch.zeros_like(positions), positions, blocks)
        with network.attention.use_rule(AttentionRule.BLOCK_DIFFUSION):
            hidden = network[0](tokens, positions, attributes.stack())[0]
        read = [place for place in range(len(text) - 1 - num_drafts[row], positions.numel()) if place != len(text)]
        expected.append(LMHead(network).logits(hidden[read]))
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-4, rtol=1e-4)
    assert forward.is_asked.sum(1).tolist() == [4, 5]
