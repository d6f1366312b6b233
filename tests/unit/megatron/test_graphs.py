"""Graphs of forwards: who is asked what, with a stand-in for CUDA's that runs the captured work again on its memory."""

from collections.abc import Callable

import pytest
import torch

from nemo_opdlm.diffusion.denoiser import Query
from nemo_opdlm.diffusion.proposal import Proposal, SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.sampler import rollout
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.megatron.attention import KVCache
from nemo_opdlm.megatron.denoiser import MegatronDenoiser
from nemo_opdlm.megatron.graphs import Capture, ForwardGraphs
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.megatron.student import StagedGPT
from nemo_opdlm.testing import tiny

ROWS, BLOCK_SIZE = 7, 4
SETTINGS = RolloutSettings(
    BLOCK_SIZE,
    BLOCK_SIZE,
    RemaskingParams(RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC, 0.1),
    tiny.MASK_TOKEN_ID,
    (tiny.END_TOKEN_ID,),
    seed=2,
    step=1,
)


class GraphedDenoiser(MegatronDenoiser):
    """Answers from graphs, as a batch in flight does; without ``capture`` it runs every forward."""

    def __init__(self, network: StagedGPT, capture: Capture | None = None) -> None:
        forbidden = torch.arange(tiny.VOCAB_SIZE) >= tiny.NUM_TOKENS
        cache = KVCache(4, 32)
        super().__init__(network, cache, BLOCK_SIZE, tiny.MASK_TOKEN_ID, SamplingParams(), forbidden, fixed_shapes=True)
        self.run = ForwardGraphs(self.answer, capture) if capture is not None else self.answer

    def propose(self, query: Query) -> Proposal:
        return self.run(self.prepare(query))


class Recorder:
    """Captures by remembering the work, and replays it into the memory of its first result."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], Proposal]) -> tuple[Callable[[], None], Proposal]:
        self.captures += 1
        proposal = run()

        def replay() -> None:
            self.replays += 1
            for name, new in vars(run()).items():
                getattr(proposal, name).copy_(new)

        return replay, proposal


@pytest.fixture(scope="module")
def network() -> StagedGPT:
    return tiny.random_network(tiny.architecture(), initialize()).eval()


@torch.no_grad()
def respond(network: StagedGPT, capture: Capture | None = None) -> Trajectory:
    denoiser = GraphedDenoiser(network, capture)
    prompt_ids = torch.randint(4, 30, (ROWS, ROWS), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(ROWS)
    requests = Requests(prompt_ids, 1 + rows, 5 + 2 * rows, rows)
    with network.attention.use_cache(denoiser.cache):
        return rollout(denoiser, requests, SETTINGS, num_slots=4, late_reads=True)


def assert_same(found: Trajectory, expected: Trajectory) -> None:
    for name, tensor in found.state_dict().items():
        expected_tensor = expected.state_dict()[name]
        assert torch.equal(torch.as_tensor(tensor), torch.as_tensor(expected_tensor)), name


def test_replayed_forwards_answer_as_those_that_are_run(network: StagedGPT) -> None:
    capture = Recorder()
    assert_same(respond(network, capture), respond(network))
    # 4 rows at a time, then 2, then 1: queries have few shapes, hence few graphs.
    assert 1 <= capture.captures <= 3 and capture.replays > 3 * capture.captures


def test_a_forward_that_cannot_be_captured_is_run_and_the_log_says_why(
    network: StagedGPT, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run: Callable[[], Proposal]) -> tuple[Callable[[], None], Proposal]:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    assert_same(respond(network, refuse), respond(network))
    (record,) = caplog.records
    assert record.message == "Rollouts go on without CUDA graphs: operation not permitted when stream is capturing"
