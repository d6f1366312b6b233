"""Log-likelihoods with a real model: those of transformers where it is causal, written out state by state where it is not."""

import copy
from itertools import permutations
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from nemo_opdlm.evaluation import likelihood
from nemo_opdlm.evaluation.generation import Generator
from nemo_opdlm.evaluation.likelihood import Text, causal_log_likelihood, diffusion_log_likelihood
from nemo_opdlm.models.conversion import convert_hf_to_nemo
from nemo_opdlm.testing import tiny
from tests.integration.plain_transformers import block_logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without a free row for the mask: the conversion adds one."""
    return tiny.write_hf_folder(tmp_path_factory.mktemp("hf") / "model", "llama", vocab_size=tiny.NUM_TOKENS)


@pytest.fixture(scope="module")
def generator(folder: Path) -> Generator:
    convert_hf_to_nemo(folder, folder.parent / "model.nemo")
    return Generator.load(folder.parent / "model.nemo")


@pytest.fixture(scope="module")
def plain(folder: Path) -> PreTrainedModel:
    """The original with the row that the conversion added, by transformers alone."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model


def some_texts(lengths: list[tuple[int, int]]) -> list[Text]:
    generator = torch.Generator().manual_seed(0)

    def some(length: int) -> torch.Tensor:
        return torch.randint(4, tiny.NUM_TOKENS, (length,), generator=generator)

    return [Text(some(given), some(judged), number) for number, (given, judged) in enumerate(lengths)]


def test_the_causal_likelihood_is_that_of_the_ar_original(generator: Generator, plain: PreTrainedModel) -> None:
    assert generator.added_rows == 1
    texts = some_texts([(1, 1), (7, 9), (3, 2), (30, 12)])
    found, is_greedy = causal_log_likelihood(generator, texts, batch_size=3)
    for number, text in enumerate(texts):
        logits = plain(torch.cat([text.given, text.judged])[None]).logits[0, len(text.given) - 1 : -1]
        expected = logits.log_softmax(-1).gather(1, text.judged[:, None]).sum()
        assert float(found.total[number]) == pytest.approx(float(expected), abs=1e-4)
        assert bool(is_greedy[number]) == bool((logits.argmax(-1) == text.judged).all())


def test_a_continuation_that_greedy_decoding_writes_is_greedy(generator: Generator, plain: PreTrainedModel) -> None:
    given = torch.tensor([5, 6, 7])
    written = plain.generate(given[None], attention_mask=torch.ones(1, 3), max_new_tokens=5, do_sample=False)[0, 3:]
    assert causal_log_likelihood(generator, [Text(given, written, 0)], 1)[1].tolist() == [True]


def written_out(model: PreTrainedModel, text: Text, block_size: int, mask_id: int) -> float:
    """The mean over all orders of each block, one forward for each state."""
    row, first = torch.cat([text.given, text.judged]), len(text.given)
    total = 0.0
    for start in range(first // block_size * block_size, len(row), block_size):
        judged = list(range(max(first, start), min(start + block_size, len(row))))
        seen: dict[frozenset[int], torch.Tensor] = {}
        orders = list(permutations(judged))
        for order in orders:
            for step, position in enumerate(order):
                masked = frozenset(order[step:])
                if masked not in seen:
                    block = torch.full((block_size,), mask_id)
                    shown = [i for i in range(start, min(start + block_size, len(row))) if i not in masked]
                    block[torch.tensor(shown, dtype=torch.int64) - start] = row[shown]
                    logits = block_logits(model, torch.cat([row[:start], block]), block_size)
                    logits[:, mask_id] = float("-inf")
                    seen[masked] = logits.log_softmax(-1)
                total += float(seen[masked][position - start, row[position]]) / len(orders)
    return total


@pytest.fixture(scope="module")
def with_mask_row(generator: Generator, plain: PreTrainedModel) -> PreTrainedModel:
    """The converted network, mask row included, in transformers."""
    model, mask_id = copy.deepcopy(plain), generator.tokens.mask_token_id
    model.resize_token_embeddings(mask_id + 1, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[mask_id] = generator.network.head_weight()[mask_id]
    return model


def test_the_bound_is_the_mean_over_all_orders(generator: Generator, with_mask_row: PreTrainedModel) -> None:
    texts = some_texts([(6, 7), (4, 4), (1, 2)])
    found = diffusion_log_likelihood(generator, texts, 2, block_size=4, num_samples=4, seed=0)
    mask_id = generator.tokens.mask_token_id
    expected = [written_out(with_mask_row, text, 4, mask_id) for text in texts]
    assert found.total.tolist() == pytest.approx(expected, abs=1e-4)
    assert found.standard_error.tolist() == [0.0] * 3


def test_random_states_come_near_all_states_within_their_error(generator: Generator) -> None:
    texts = some_texts([(5, 20), (8, 16), (3, 30)])
    exact = diffusion_log_likelihood(generator, texts, 4, block_size=8, num_samples=32, seed=0)
    drawn = diffusion_log_likelihood(generator, texts, 4, block_size=8, num_samples=8, seed=0)
    assert (exact.standard_error == 0).all() and (drawn.standard_error > 0).all()
    assert ((drawn.total - exact.total).abs() < 4 * drawn.standard_error).all()


def test_neither_batch_nor_pass_changes_a_likelihood(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = some_texts([(5, 20), (8, 3), (3, 11), (9, 9)])
    together = diffusion_log_likelihood(generator, texts, 4, block_size=8, num_samples=2, seed=0)
    monkeypatch.setattr(likelihood, "TOKENS_PER_PASS", 1)
    one_by_one = diffusion_log_likelihood(generator, texts, 4, block_size=8, num_samples=2, seed=0)
    assert torch.allclose(together.total, one_by_one.total, atol=1e-4)
