"""Training sees what the rollout saw: the two-stream forward at a visited state gives the logits of cached decoding."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_opdlm.diffusion.denoiser import Query
from nemo_opdlm.diffusion.layout import SupervisedIndex, two_stream_rows
from nemo_opdlm.diffusion.masks import TokenAttributes
from nemo_opdlm.diffusion.proposal import Proposal, SamplingParams
from nemo_opdlm.diffusion.remasking import RemaskingParams, RemaskingStrategy
from nemo_opdlm.diffusion.requests import Requests
from nemo_opdlm.diffusion.sampler import rollout
from nemo_opdlm.diffusion.settings import RolloutSettings
from nemo_opdlm.diffusion.state_selection import DenoisingState, StateSelection, all_states, select_states
from nemo_opdlm.diffusion.trajectory import FinishReason, Trajectory
from nemo_opdlm.distillation.divergence import DivergenceKind, DivergenceSpec
from nemo_opdlm.distillation.loss import Normalization
from nemo_opdlm.megatron.attention import KVCache
from nemo_opdlm.megatron.denoiser import MegatronDenoiser
from nemo_opdlm.megatron.forward import MicroBatch, forward_backward, forward_only
from nemo_opdlm.megatron.head import LMHead
from nemo_opdlm.megatron.optimizer import StudentOptimizer, wrap
from nemo_opdlm.megatron.parallel import ParallelContext
from nemo_opdlm.megatron.rollout import RolloutEngine
from nemo_opdlm.megatron.step import distillation_loss, micro_batches, total
from nemo_opdlm.megatron.student import ModelOptions, StagedGPT
from nemo_opdlm.megatron.teacher import Teacher
from nemo_opdlm.testing import tiny
from nemo_opdlm.testing.oracles import oracle_rollout

TOLERANCE = 1e-4
STATIC, DYNAMIC = RemaskingStrategy.LOW_CONFIDENCE_STATIC, RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC
OTHERS = [strategy for strategy in RemaskingStrategy if strategy is not DYNAMIC]
BLOCK_SIZES = (1, 2, 4, 8)
END_TOKEN_IDS = tuple(range(30, 36))
FORBIDDEN = torch.arange(tiny.VOCAB_SIZE) >= tiny.NUM_TOKENS
#: Which visited states are trained, and settings of it.
SELECTIONS: dict[str, tuple[StateSelection, dict[str, Any]]] = {
    "one state": (StateSelection.ONE_STATE_PER_BLOCK, {}),
    "two states": (StateSelection.ONE_STATE_PER_BLOCK, {"num_states": 2}),
    "without the end token": (StateSelection.ONE_STATE_PER_BLOCK, {"exclude_end_token": True}),
    "all states": (StateSelection.ALL_STATES, {}),
}

#: (row, forward of the row, position) -> the logits that the rollout saw there
Recording = dict[tuple[int, int, int], Tensor]


class RecordingDenoiser(MegatronDenoiser):
    """Keeps the logits of every forward, and how many forwards the network ran."""

    def __init__(self, model: StagedGPT, num_rows: int, length: int, block_size: int) -> None:
        super().__init__(
            model, KVCache(num_rows, length), block_size, tiny.MASK_TOKEN_ID, SamplingParams(temperature=1.0), FORBIDDEN
        )
        self.recording: Recording = {}
        self.forwards_of_row = [0] * num_rows
        self.num_prefills = self.num_proposals = 0
        self._places: list[tuple[int, int, int]] = []

    def prefill(self, query: Query) -> None:
        self.num_prefills += 1
        super().prefill(query)

    def propose(self, query: Query) -> Proposal:
        self.num_proposals += 1
        rows = query.slots
        for row in rows.tolist():
            self.forwards_of_row[row] += 1
        is_masked = query.token_ids[:, -self.block_size :] == self.mask_token_id
        row, column = is_masked.nonzero(as_tuple=True)
        positions = query.position_ids[:, -self.block_size :][row, column].tolist()
        self._places = [
            (owner, self.forwards_of_row[owner], position)
            for owner, position in zip(rows[row].tolist(), positions, strict=True)
        ]
        return super().propose(query)

    def logits(self, hidden: Tensor) -> Tensor:
        logits = super().logits(hidden)
        self.recording |= dict(zip(self._places, logits, strict=True))
        return logits


class SeparatelyCommittingDenoiser(RecordingDenoiser):
    """Spends a forward of its own on writing the pending block's keys, as samplers without the fused commit do."""

    def propose(self, query: Query) -> Proposal:
        if query.token_ids.shape[1] == 2 * self.block_size:
            has_pending = query.valid[:, 0]
            columns = (query.token_ids, query.position_ids, query.valid)
            pending = (column[has_pending, : self.block_size] for column in columns)
            super().prefill(Query(query.slots[has_pending], *pending, query.num_keys, None))
            query = Query(query.slots, *(x[:, self.block_size :] for x in columns), query.num_keys, query.uniform)
        return super().propose(query)


def settings(block_size: int, strategy: RemaskingStrategy, seed: int = 3) -> RolloutSettings:
    # Tiny random networks are unsure of everything: a low threshold reveals several positions at a time.
    return RolloutSettings(
        block_size=block_size,
        denoising_steps=block_size,
        remasking=RemaskingParams(strategy, threshold=0.06),
        mask_token_id=tiny.MASK_TOKEN_ID,
        end_token_ids=END_TOKEN_IDS,
        seed=seed,
        step=1,
    )


def requests_of_every_kind(block_size: int) -> Requests:
    """Prompts of every remainder, below one block and beyond two, and length limits of every kind."""
    num_rows = 2 * block_size + 3
    prompt_len = 1 + torch.arange(num_rows)
    generator = torch.Generator().manual_seed(block_size)
    prompt_ids = torch.randint(4, 30, (num_rows, num_rows), generator=generator)
    max_new_tokens = torch.randint(1, 4 * block_size + 2, (num_rows,), generator=generator)
    return Requests(prompt_ids, prompt_len, max_new_tokens, torch.arange(num_rows))


@contextmanager
def evaluating(network: StagedGPT) -> Iterator[None]:
    network.eval()
    with torch.no_grad():
        yield
    network.train()


def record(
    network: StagedGPT,
    block_size: int,
    strategy: RemaskingStrategy,
    denoiser_type: type[RecordingDenoiser] = RecordingDenoiser,
) -> tuple[Trajectory, RecordingDenoiser]:
    """Roll out, and keep what the rollout saw."""
    requests = requests_of_every_kind(block_size)
    longest = int((requests.prompt_len + requests.max_new_tokens).max())
    denoiser = denoiser_type(network, len(requests), -(-longest // block_size) * block_size, block_size)
    with evaluating(network), network.attention.use_cache(denoiser.cache):
        return rollout(denoiser, requests, settings(block_size, strategy)), denoiser


def training_logits(
    network: StagedGPT, trajectory: Trajectory, states: DenoisingState
) -> tuple[SupervisedIndex, Tensor]:
    """Logits ``[M, V]`` of one two-stream forward over all rows at the supervised positions."""
    rows = two_stream_rows(trajectory, states)
    index = rows.supervised_index
    batch = MicroBatch(rows.token_ids, rows.attributes)
    with evaluating(network):
        hidden = forward_only(network, [batch], lambda hidden, _: hidden[index.row, index.column])[0]
        return index, LMHead(network).logits(hidden)


def largest_difference(network: StagedGPT, trajectory: Trajectory, recording: Recording) -> float:
    """Over every state of the trajectory and every position that is masked in it."""
    states = all_states(trajectory, tiny.MASK_TOKEN_ID)
    index, logits = training_logits(network, trajectory, states)
    block_size = trajectory.block_size
    is_masked = states.state_ids == tiny.MASK_TOKEN_ID
    seen = []
    for row, copy, position in zip(index.row.tolist(), index.copy.tolist(), index.position.tolist(), strict=True):
        block = slice(position - position % block_size, position - position % block_size + block_size)
        # A state is the block just before the forward that revealed the first of its masks.
        forward = int(trajectory.unmask_step[row, block][is_masked[row, copy, block]].min())
        seen.append(recording[row, forward, position])
    return float((torch.stack(seen) - logits).abs().max())


def train(network: StagedGPT, parallel: ParallelContext, num_updates: int = 3) -> None:
    """A few real updates, large enough to change every logit."""
    settings_of_adam = tiny.optimizer_settings()
    wrapped = wrap(network, settings_of_adam)
    optimizer = StudentOptimizer(wrapped, settings_of_adam)
    teacher = Teacher(network.arch, parallel, ModelOptions(), micro_batch_size=4)
    spec = DivergenceSpec()
    loss = distillation_loss(LMHead(network), spec)
    for _ in range(num_updates):
        trajectory, _ = record(network, 4, DYNAMIC)
        states, targets = all_states(trajectory, tiny.MASK_TOKEN_ID), teacher.targets(trajectory, spec)
        rows = torch.arange(len(trajectory))
        optimizer.zero_grad()
        forward_backward(wrapped, micro_batches(trajectory, states, targets, rows, Normalization.token, 4), loss)
        optimizer.step()


@pytest.fixture(scope="module")
def fresh(parallel: ParallelContext) -> StagedGPT:
    """A random student."""
    return tiny.random_network(tiny.architecture(), parallel)


@pytest.fixture(scope="module")
def trained(parallel: ParallelContext) -> StagedGPT:
    """The same student after a few updates."""
    network = tiny.random_network(tiny.architecture(), parallel)
    before = network.head_weight().detach().clone()
    train(network, parallel)
    assert float((network.head_weight() - before).abs().max()) > 1e-2
    return network


@pytest.fixture(params=["fresh", "trained"])
def network(request: pytest.FixtureRequest) -> StagedGPT:
    """A student before or after training."""
    student: StagedGPT = request.getfixturevalue(request.param)
    return student


@pytest.mark.parametrize("strategy", [STATIC, DYNAMIC])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_training_logits_at_every_visited_state_are_those_the_rollout_saw(
    network: StagedGPT, block_size: int, strategy: RemaskingStrategy
) -> None:
    trajectory, denoiser = record(network, block_size, strategy)
    assert set((trajectory.prompt_len % block_size).tolist()) == set(range(block_size))
    assert trajectory.num_forwards.unique().numel() > 1, "rows were meant to finish at different times"
    assert largest_difference(network, trajectory, denoiser.recording) < TOLERANCE


def test_the_rollouts_compared_end_in_both_ways_and_reveal_several_tokens_at_a_time(fresh: StagedGPT) -> None:
    trajectory, _ = record(fresh, 8, DYNAMIC)
    assert set(trajectory.finish_reason.tolist()) == {FinishReason.END_OF_TURN, FinishReason.LENGTH}
    assert int(trajectory.num_forwards.sum()) < int(trajectory.response_len.sum())


@pytest.mark.parametrize("strategy", [STATIC, DYNAMIC])
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_fused_commit_leaves_the_cache_and_the_logits_of_a_separate_cache_write(
    fresh: StagedGPT, block_size: int, strategy: RemaskingStrategy
) -> None:
    fused_trajectory, fused = record(fresh, block_size, strategy)
    separate_trajectory, separate = record(fresh, block_size, strategy, SeparatelyCommittingDenoiser)
    assert torch.equal(fused_trajectory.token_ids, separate_trajectory.token_ids)
    assert fused.recording.keys() == separate.recording.keys()
    for place, logits in fused.recording.items():
        torch.testing.assert_close(logits, separate.recording[place], atol=TOLERANCE, rtol=0)
    # Everything before a row's last block is committed, the last block never.
    committed = torch.arange(fused.cache.length) < (fused_trajectory.row_end - block_size)[:, None]
    for layer in range(1, fresh.arch.num_layers + 1):
        for ours, theirs in zip(fused.cache.layer(layer), separate.cache.layer(layer), strict=True):
            rows_first = (x[:, :, : fused.cache.length].transpose(1, 2)[committed] for x in (ours, theirs))
            torch.testing.assert_close(*rows_first, atol=TOLERANCE, rtol=0)


@dataclass(frozen=True)
class WithoutCache:
    """The network as the slow loop asks it: every forward over the whole text, nothing kept."""

    network: StagedGPT
    block_size: int
    params: SamplingParams
    forbidden_mask: Tensor = FORBIDDEN

    def logits(self, token_ids: list[int], start: int) -> Tensor:
        ids, positions = torch.tensor([token_ids]), torch.arange(len(token_ids))[None]
        clean = torch.zeros_like(positions)
        batch = MicroBatch(ids, TokenAttributes(clean, clean, positions, positions // self.block_size))
        with evaluating(self.network):
            return LMHead(self.network).logits(
                forward_only(self.network, [batch], lambda hidden, _: hidden[0, start:])[0]
            )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("block_size", "strategy"), [*((size, DYNAMIC) for size in BLOCK_SIZES), *((4, s) for s in OTHERS)]
)
def test_the_engine_writes_what_the_slow_loop_without_a_cache_writes(
    fresh: StagedGPT, block_size: int, strategy: RemaskingStrategy, temperature: float
) -> None:
    params, decoding = SamplingParams(temperature), settings(block_size, strategy)
    requests = requests_of_every_kind(block_size)
    # Fewer slots than rows: some rows follow others in theirs.
    trajectory = RolloutEngine(fresh, params, FORBIDDEN, max_batch_size=4).generate(requests, decoding)
    slow = WithoutCache(fresh, block_size, params)
    for row in range(len(requests)):
        prompt = requests.prompt_ids[row, : requests.prompt_len[row]].tolist()
        limit, sample = int(requests.max_new_tokens[row]), int(requests.sample_ids[row])
        expected = oracle_rollout(slow, prompt, limit, sample, decoding)
        end = len(expected.token_ids)
        assert trajectory.row_end[row] == end
        assert trajectory.token_ids[row, :end].tolist() == expected.token_ids
        assert trajectory.unmask_step[row, :end].tolist() == expected.unmask_step
        assert trajectory.confidence[row, :end].tolist() == pytest.approx(expected.confidence, rel=TOLERANCE)
        assert trajectory.response_len[row] == expected.response_len
        assert trajectory.finish_reason[row] == expected.finish_reason
        assert trajectory.num_forwards[row] == expected.num_forwards


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_no_forward_is_spent_on_the_cache_alone_and_none_follows_the_last_block(
    fresh: StagedGPT, block_size: int
) -> None:
    trajectory, denoiser = record(fresh, block_size, STATIC)
    assert denoiser.forwards_of_row == trajectory.num_forwards.tolist()
    assert denoiser.num_proposals == max(denoiser.forwards_of_row) and denoiser.num_prefills == 1
    # Static decoding reveals one token per forward, the rest of the final block included.
    assert trajectory.num_forwards.tolist() == (trajectory.row_end - trajectory.prompt_len).tolist()


@pytest.mark.parametrize("block_size", [2, 4, 8])
def test_a_clean_token_that_is_masked_in_a_state_changes_no_logit_of_its_block(
    fresh: StagedGPT, block_size: int
) -> None:
    trajectory, _ = record(fresh, block_size, STATIC)
    states = all_states(trajectory, tiny.MASK_TOKEN_ID)
    rows = two_stream_rows(trajectory, states)
    index, attributes = rows.supervised_index, rows.attributes
    _, before = training_logits(fresh, trajectory, states)
    block_of = attributes.block_ids[index.row, index.column]
    changed_later = 0
    for block in range(trajectory.token_ids.shape[1] // block_size):
        # Every clean response token of this block in every row, the prompt's remainder apart.
        is_answer = (attributes.stream_ids == 0) & (attributes.block_ids == block) & (attributes.document_ids >= 0)
        is_answer &= attributes.position_ids >= trajectory.prompt_len[:, None]
        token_ids = torch.where(is_answer, (rows.token_ids + 1) % 30, rows.token_ids)
        with evaluating(fresh):
            hidden = forward_only(
                fresh, [MicroBatch(token_ids, attributes)], lambda hidden, _: hidden[index.row, index.column]
            )[0]
            after = LMHead(fresh).logits(hidden)
        is_later = block_of > block
        assert torch.equal(after[~is_later], before[~is_later])
        changed_later += int((after[is_later] != before[is_later]).any(-1).sum())
    assert changed_later > 0


# -- the same, as training measures it --


def select(trajectory: Trajectory, selection: str) -> DenoisingState:
    name, options = SELECTIONS[selection]
    return select_states(name, trajectory, tiny.MASK_TOKEN_ID, seed=5, step=1, **options)


def logprob_gap(network: StagedGPT, trajectory: Trajectory, states: DenoisingState) -> tuple[int, float, float]:
    """Number of tokens compared, mean and largest gap of one update's micro-batches."""
    targets, rows = Teacher.own_tokens(trajectory), torch.arange(len(trajectory))
    batches = micro_batches(trajectory, states, targets, rows, Normalization.token, 4, forbidden=FORBIDDEN)
    loss = distillation_loss(LMHead(network), DivergenceSpec(DivergenceKind.nll))
    parts = forward_only(network, batches, lambda hidden, batch: loss(hidden, batch)[2])
    totals = total(parts, network.parallel)
    return int(totals["num_revealed"]), totals["logprob_gap_sum"] / totals["num_revealed"], totals["logprob_gap_max"]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_tokens_are_as_probable_in_training_as_when_they_were_revealed(
    network: StagedGPT, block_size: int, selection: str
) -> None:
    trajectory, _ = record(network, block_size, DYNAMIC)
    count, mean, largest = logprob_gap(network, trajectory, select(trajectory, selection))
    # Every block has such a token, unless it is an end token that is not supervised.
    assert count >= int((trajectory.row_end // block_size - trajectory.prompt_len // block_size).sum()) / 2
    assert 0 < mean <= largest < TOLERANCE
    if selection == "all states":
        assert count == int(trajectory.response_len.sum()), "each token was revealed at one of all states"


def test_other_weights_than_the_rollouts_show_as_a_gap(parallel: ParallelContext) -> None:
    network = tiny.random_network(tiny.architecture(), parallel)
    trajectory, _ = record(network, 4, DYNAMIC)
    states = select(trajectory, "one state")
    with torch.no_grad():
        network[0].decoder.layers[0].mlp.linear_fc2.weight[0] += 0.05
    _, mean, largest = logprob_gap(network, trajectory, states)
    assert 10 * TOLERANCE < mean < largest


def test_measuring_the_gap_changes_no_bit_of_loss_and_gradients(fresh: StagedGPT, parallel: ParallelContext) -> None:
    trajectory, _ = record(fresh, 4, DYNAMIC)
    states, rows = select(trajectory, "two states"), torch.arange(len(trajectory))
    targets = Teacher(fresh.arch, parallel, ModelOptions(), micro_batch_size=4).targets(trajectory, DivergenceSpec())
    found = []
    for forbidden in (None, FORBIDDEN):
        network = wrap(tiny.random_network(tiny.architecture(), parallel), tiny.optimizer_settings())
        batches = micro_batches(trajectory, states, targets, rows, Normalization.token, 4, forbidden=forbidden)
        parts = forward_backward(network, batches, distillation_loss(network.head, DivergenceSpec()))
        gradients = [parameter.main_grad for parameter in network.model.parameters()]  # type: ignore[attr-defined]
        found.append([part["loss_sum"] for part in parts] + gradients)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))
