"""Self-speculative decoding on several ranks: the text and the forwards of one process, on any layout."""

from typing import Any

import pytest
import torch

from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.megatron.rollout import RolloutEngine
from nemo_opdlm.testing.ranks import Ranks
from tests.parallel import runs
from tests.parallel.runs import LAYOUTS, Layout

ROWS = 6


def respond(archive: str, layout: Layout, mode: str) -> dict[str, Any]:
    """Rows from three words, one on each shard's side of the vocabulary, so that drafts are often right and often wrong."""
    run = runs.build(archive, layout)
    forbidden = torch.ones_like(run.method.tokens.forbidden)
    forbidden[[40, 300, 900]] = False
    engine = RolloutEngine(run.student.model, SamplingParams(1.0), forbidden, max_batch_size=4)
    prompt_ids = torch.randint(40, 900, (ROWS, 9), generator=torch.Generator().manual_seed(0))
    requests = Requests(prompt_ids, torch.arange(1, ROWS + 1), torch.arange(15, 15 + ROWS), torch.arange(ROWS))
    return getattr(engine, f"generate_{mode}")(requests, run.method.rollout_settings(1)).state_dict()


@pytest.mark.parametrize("name", ["TP2+SP", "PP2"])
def test_text_and_forwards_are_those_of_one_process(name: str, glassllm: str, two_ranks: Ranks) -> None:
    causal, expected = (respond(glassllm, Layout(), mode) for mode in ("autoregressive", "speculative"))
    assert expected["num_forwards"].sum() < 0.9 * causal["num_forwards"].sum()
    for found in two_ranks.run(respond, glassllm, LAYOUTS[name][1], "speculative"):
        for key in ("token_ids", "response_len", "finish_reason"):
            assert torch.equal(found[key], causal[key]), key
        for key in ("unmask_step", "num_forwards"):
            assert torch.equal(found[key], expected[key]), key
