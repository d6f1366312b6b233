"""How much two batches in flight are worth to a pipeline of two stages, beside one batch at a time.

python -m tests.parallel.bench_flights
"""

import statistics
import time

import torch

from nemo_opdlm.diffusion.proposal import SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.megatron import parallel, rollout
from nemo_opdlm.megatron.flight import fly
from nemo_opdlm.megatron.rollout import RolloutEngine
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.ranks import Ranks

ROWS, PROMPT, RESPONSE, VOCAB_SIZE = 32, 16, 32, 4096
SHAPE = {
    "num_layers": 8,
    "hidden_size": 512,
    "ffn_hidden_size": 1536,
    "num_attention_heads": 8,
    "num_query_groups": 4,
    "kv_channels": 64,
    "vocab_size": VOCAB_SIZE,
    "share_embeddings_and_output_weights": False,
}


def seconds(in_flight: int) -> tuple[float, int]:
    """Time of one rollout on this stage, and the sum of its tokens."""
    parallel.destroy()
    context = parallel.initialize(pipeline_model_parallel_size=2)
    network = tiny.random_network(tiny.architecture(**SHAPE), context)
    # One at a time: each batch lands before the next one starts.
    rollout.fly = fly if in_flight == 2 else lambda model, starts: [t for start in starts for t in fly(model, [start])]
    remasking = RemaskingParams(RemaskingStrategy.LOW_CONFIDENCE_STATIC)
    settings = RolloutSettings(4, 4, remasking, VOCAB_SIZE - 1, (1,), seed=0, step=1)
    engine = RolloutEngine(network, SamplingParams(), torch.arange(VOCAB_SIZE) == VOCAB_SIZE - 1, ROWS)
    prompts = torch.randint(2, VOCAB_SIZE - 1, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0))
    lengths, limits = torch.full((ROWS,), PROMPT), torch.full((ROWS,), RESPONSE)
    requests = Requests(prompts, lengths, limits, torch.arange(ROWS))
    start = time.perf_counter()
    trajectory = engine.generate(requests, settings)
    return time.perf_counter() - start, int(trajectory.token_ids.sum())


def main() -> None:
    """Five rollouts each, in turn."""
    times: dict[int, list[float]] = {1: [], 2: []}
    with Ranks(2) as ranks:
        ranks.run(seconds, 2)  # warm-up
        for _ in range(5):
            for in_flight, found in times.items():
                found.append(ranks.run(seconds, in_flight)[0][0])
    one, two = (statistics.median(found) for found in times.values())
    print(f"one batch at a time {one:.2f} s, two in flight {two:.2f} s: {one / two:.2f} x (2 x at best)")


if __name__ == "__main__":
    # Ranks find functions by the name of their module.
    from tests.parallel.bench_flights import main as importable_main

    importable_main()
