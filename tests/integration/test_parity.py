"""Under the causal rule the Megatron network is the model that transformers loads: same logits, same greedy text."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from nemo_opdlm.convert.hugging_face import HfImport, hf_to_megatron
from nemo_opdlm.diffusion.masks import AttentionRule, TokenAttributes
from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingParams
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.megatron.forward import MicroBatch, forward_only
from nemo_opdlm.megatron.head import LMHead
from nemo_opdlm.megatron.parallel import ParallelContext
from nemo_opdlm.megatron.rollout import RolloutEngine
from nemo_opdlm.megatron.student import StagedGPT
from nemo_opdlm.testing import tiny

NUM_NEW_TOKENS = 64
TEXTS = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune,",
    "Alice was",
    "The old house stood at the end of the lane, and nobody had lived in it since the summer of",
)


class Pair:
    """One folder, loaded by transformers and by us."""

    def __init__(self, folder: Path, parallel: ParallelContext, dtype: torch.dtype = torch.float32) -> None:
        self.reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.imported: HfImport = hf_to_megatron(folder, dtype=dtype)
        self.network: StagedGPT = tiny.load_import(self.imported, parallel, AttentionRule.BLOCK_DIFFUSION)

    @property
    def vocab_size(self) -> int:
        """Rows that the reference has; an added mask row comes behind them."""
        return int(self.reference.config.vocab_size)

    @torch.no_grad()
    def reference_logits(self, token_ids: Tensor) -> Tensor:
        return self.reference(token_ids[None]).logits[0]

    def logits(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """Causal logits of rows of different lengths, in one batch."""
        token_ids = pad_sequence(list(rows), batch_first=True)
        position_ids = torch.arange(token_ids.shape[1]).expand_as(token_ids)
        document = torch.arange(len(rows))[:, None].expand_as(token_ids)
        attributes = TokenAttributes(document, torch.zeros_like(token_ids), position_ids, position_ids // 4)
        self.network.attention.rule = AttentionRule.CAUSAL
        hidden = forward_only(self.network, [MicroBatch(token_ids, attributes)], lambda hidden, _: hidden)[0]
        logits = LMHead(self.network).logits(hidden)[..., : self.vocab_size]
        return [row[: ids.numel()] for row, ids in zip(logits, rows, strict=True)]

    def greedy(self, prompts: Sequence[Tensor]) -> list[list[int]]:
        """Greedy continuations by our sampler, all prompts in one batch; only an added mask row is forbidden."""
        forbidden = torch.arange(self.imported.architecture.vocab_size) >= self.vocab_size
        engine = RolloutEngine(self.network, SamplingParams(temperature=0.0), forbidden, max_batch_size=len(prompts))
        settings = RolloutSettings(
            block_size=4,
            denoising_steps=4,
            remasking=RemaskingParams("low_confidence_static"),  # type: ignore[arg-type]
            mask_token_id=self.imported.origin.mask_token_id,
            end_token_ids=(),
            seed=0,
            step=1,
        )
        prompt_len = torch.tensor([prompt.numel() for prompt in prompts])
        limits = torch.full_like(prompt_len, NUM_NEW_TOKENS)
        prompt_ids = pad_sequence(list(prompts), batch_first=True)
        requests = Requests(prompt_ids, prompt_len, limits, torch.arange(len(prompts)))
        answers = engine.generate_autoregressive(requests, settings)
        return answers.token_ids[answers.is_response].view(len(prompts), NUM_NEW_TOKENS).tolist()

    def reference_greedy(self, prompt: Tensor) -> list[int]:
        # Nothing is padded here, and the end of a text is a token like any other.
        answer = self.reference.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=NUM_NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return answer[0, prompt.numel() :].tolist()


def assert_same_logits(pair: Pair, rows: Sequence[Tensor], tolerance: float = 1e-4) -> None:
    for token_ids, logits in zip(rows, pair.logits(rows), strict=True):
        torch.testing.assert_close(logits, pair.reference_logits(token_ids), atol=tolerance, rtol=0)


def encoded(folder: Path) -> list[Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [torch.tensor(tokenizer(text).input_ids) for text in TEXTS]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def tiny_pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, parallel: ParallelContext
) -> Pair:
    """A random checkpoint of every supported kind."""
    return Pair(tiny.write_hf_folder(tmp_path_factory.mktemp("hf"), request.param), parallel)


@pytest.fixture(scope="module")
def glassllm(glassllm_folder: Path, parallel: ParallelContext) -> Pair:
    """A real model of 0.85 million parameters."""
    return Pair(glassllm_folder, parallel)


def test_causal_logits_of_every_family_are_those_of_transformers(tiny_pair: Pair) -> None:
    generator = torch.Generator().manual_seed(1)
    # Long enough for every band of a scaled rotary embedding.
    rows = [torch.randint(tiny.NUM_TOKENS, (length,), generator=generator) for length in (200, 3, 57)]
    assert_same_logits(tiny_pair, rows, tolerance=2e-5)


def test_greedy_text_of_every_family_is_that_of_transformers(tiny_pair: Pair) -> None:
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(tiny.NUM_TOKENS, (length,), generator=generator) for length in (1, 8, 13)]
    assert tiny_pair.greedy(prompts) == [tiny_pair.reference_greedy(prompt) for prompt in prompts]


def test_glassllm_is_the_model_that_transformers_loads(glassllm: Pair, glassllm_folder: Path) -> None:
    prompts = encoded(glassllm_folder)
    assert_same_logits(glassllm, prompts)
    assert glassllm.greedy(prompts) == [glassllm.reference_greedy(prompt) for prompt in prompts]


def test_smollm2_is_the_model_that_transformers_loads(smollm2_folder: Path, parallel: ParallelContext) -> None:
    prompts, pair = encoded(smollm2_folder), Pair(smollm2_folder, parallel)
    assert_same_logits(pair, prompts)
    assert pair.greedy(prompts[:1]) == [pair.reference_greedy(prompts[0])]
