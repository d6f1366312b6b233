"""What the student computes in training is what it computed in the rollout, seen through a real attention network."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_opdlm.diffusion.denoiser import Query
from nemo_opdlm.diffusion.layout import TwoStreamRows, two_stream_rows
from nemo_opdlm.diffusion.masks import AttentionRule, TokenAttributes, dense
from nemo_opdlm.diffusion.proposal import Proposal, SamplingParams, propose
from nemo_opdlm.diffusion.sampler import rollout
from nemo_opdlm.diffusion.state_selection import DenoisingState, all_states, one_state_per_block
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.testing.trajectories import MASK_TOKEN_ID, VOCAB_SIZE, random_requests, rollout_settings
from nemo_opdlm.vocab import LocalVocab

BLOCK_SIZES = [1, 2, 3, 4]
NUM_LAYERS, HIDDEN = 3, 8


class TinyNetwork:
    """Three layers of attention over tokens and positions, fp64."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def weight(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.tokens, self.positions = weight(VOCAB_SIZE, HIDDEN), weight(64, HIDDEN)
        self.layers = [weight(3, HIDDEN, HIDDEN) / HIDDEN**0.5 for _ in range(NUM_LAYERS)]
        self.head = weight(HIDDEN, VOCAB_SIZE)

    def embed(self, token_ids: Tensor, position_ids: Tensor) -> Tensor:
        return self.tokens[token_ids] + self.positions[position_ids]

    def __call__(self, token_ids: Tensor, attributes: TokenAttributes) -> Tensor:
        """Logits ``[B, N, V]`` of whole rows."""
        mask = dense(AttentionRule.BLOCK_DIFFUSION, attributes, attributes)[:, 0]
        hidden = self.embed(token_ids, attributes.position_ids)
        for layer in self.layers:
            query, key, value = (hidden @ projection for projection in layer)
            hidden = hidden + attend(query, key, value, mask)
        return hidden @ self.head


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    scores = (query @ key.mT / math.sqrt(HIDDEN)).masked_fill(~mask, -torch.inf)
    return torch.tanh(scores.softmax(-1) @ value)


class CachedDenoiser:
    """The network with a cache by absolute position: every forward writes the keys of all its tokens."""

    def __init__(self, network: TinyNetwork, num_rows: int, block_size: int) -> None:
        self.network, self.block_size = network, block_size
        shape = (NUM_LAYERS, 2, num_rows, 64, HIDDEN)
        self.cache = torch.full(shape, torch.nan, dtype=torch.float64)
        self.logits: dict[tuple[int, int, tuple[int, ...]], Tensor] = {}

    def prefill(self, query: Query) -> None:
        self.forward(query)

    def propose(self, query: Query) -> Proposal:
        logits = self.forward(query)[:, -self.block_size :]
        for i, row in enumerate(query.slots.tolist()):
            block = tuple(query.token_ids[i, -self.block_size :].tolist())
            self.logits[row, int(query.position_ids[i, -self.block_size]), block] = logits[i]
        forbidden = torch.arange(VOCAB_SIZE) == MASK_TOKEN_ID
        assert query.uniform is not None
        return propose(logits, query.uniform, SamplingParams(), forbidden, LocalVocab())

    def forward(self, query: Query) -> Tensor:
        rows, token_ids, position_ids, valid, visible, _ = query
        keys_at = torch.arange(visible).expand(len(rows), -1)
        mask = dense(AttentionRule.BLOCK_DIFFUSION, self.attributes(position_ids), self.attributes(keys_at))[:, 0]
        hidden = self.network.embed(token_ids, position_ids)
        for layer, cache in zip(self.network.layers, self.cache, strict=True):
            query, key, value = (hidden @ projection for projection in layer)
            for store, new in zip(cache, (key, value), strict=True):
                for i, row in enumerate(rows.tolist()):
                    store[row, position_ids[i, valid[i]]] = new[i, valid[i]]
            # What may not be seen may be uninitialised: NaN would survive a weight of 0.
            seen_key, seen_value = (store[rows, :visible].nan_to_num() for store in cache)
            hidden = hidden + attend(query, seen_key, seen_value, mask)
        return hidden @ self.network.head

    def attributes(self, position_ids: Tensor) -> TokenAttributes:
        zeros = torch.zeros_like(position_ids)
        return TokenAttributes(zeros, zeros, position_ids, position_ids // self.block_size)


def roll_out(block_size: int, num_rows: int = 10) -> tuple[TinyNetwork, CachedDenoiser, Trajectory]:
    network = TinyNetwork()
    denoiser = CachedDenoiser(network, num_rows, block_size)
    settings = rollout_settings(block_size, threshold=0.2)
    return network, denoiser, rollout(denoiser, random_requests(num_rows, block_size), settings)


def logits_at_states(
    network: TinyNetwork, trajectory: Trajectory, states: DenoisingState
) -> tuple[Tensor, TwoStreamRows]:
    """Training logits on the canvas ``[B, C, L, V]``; NaN where no state token stands."""
    rows = two_stream_rows(trajectory, states)
    logits = network(rows.token_ids, rows.attributes)
    canvas = torch.full((*states.state_ids.shape, VOCAB_SIZE), torch.nan, dtype=torch.float64)
    row, column = (rows.copy_ids >= 0).nonzero(as_tuple=True)
    canvas[row, rows.copy_ids[row, column], rows.attributes.position_ids[row, column]] = logits[row, column]
    return canvas, rows


def response_blocks(trajectory: Trajectory, row: int) -> range:
    size = trajectory.block_size
    return range(int(trajectory.prompt_len[row]) // size * size, int(trajectory.row_end[row]), size)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_training_logits_of_every_visited_state_are_the_samplers(block_size: int) -> None:
    # Prompts of 1 to 10 tokens: every remainder modulo the block size, with and without a whole block before it.
    network, denoiser, trajectory = roll_out(block_size)
    states = all_states(trajectory, MASK_TOKEN_ID)
    logits, _ = logits_at_states(network, trajectory, states)
    compared = 0
    for row in range(len(trajectory)):
        for start in response_blocks(trajectory, row):
            block = slice(start, start + block_size)
            for copy in range(int(states.num_states[row])):
                if not states.loss_mask[row, copy, block].any():
                    continue
                seen = denoiser.logits[row, start, tuple(states.state_ids[row, copy, block].tolist())]
                torch.testing.assert_close(logits[row, copy, block], seen, rtol=1e-10, atol=1e-10)
                compared += 1
    assert compared > len(trajectory)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_fused_commit_leaves_the_cache_of_a_separate_pass_over_the_finished_text(block_size: int) -> None:
    network, denoiser, trajectory = roll_out(block_size)
    for row in range(len(trajectory)):
        committed = int(trajectory.row_end[row]) - block_size
        if committed == 0:
            continue
        separate = CachedDenoiser(network, 1, block_size)
        tokens, positions = trajectory.token_ids[row : row + 1, :committed], torch.arange(committed)[None]
        valid = torch.ones_like(positions, dtype=torch.bool)
        separate.prefill(Query(torch.tensor([0]), tokens, positions, valid, committed, None))
        actual, expected = denoiser.cache[:, :, row, :committed], separate.cache[:, :, 0, :committed]
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_clean_token_that_is_masked_in_a_state_changes_no_logit_of_its_block(block_size: int) -> None:
    network, _, trajectory = roll_out(block_size)
    states = one_state_per_block(trajectory, MASK_TOKEN_ID, num_states=2, seed=0, step=1)
    logits, rows = logits_at_states(network, trajectory, states)
    for row in range(len(trajectory)):
        for start in response_blocks(trajectory, row):
            block = slice(start, start + block_size)
            clean = (rows.attributes.stream_ids[row] == 0) & (rows.attributes.document_ids[row] == row)
            changed = rows.token_ids.clone()
            answer = clean & (rows.attributes.position_ids[row] >= max(start, int(trajectory.prompt_len[row])))
            changed[row, answer] = (changed[row, answer] + 1) % MASK_TOKEN_ID
            after = network(changed, rows.attributes)[row]
            for copy in range(2):
                mine = (rows.copy_ids[row] == copy) & (rows.attributes.block_ids[row] == start // block_size)
                assert torch.equal(after[mine], logits[row, copy, block])


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_copies_in_one_row_have_the_logits_of_rows_of_their_own(block_size: int) -> None:
    network, _, trajectory = roll_out(block_size)
    states = one_state_per_block(trajectory, MASK_TOKEN_ID, num_states=3, seed=0, step=1)
    together, _ = logits_at_states(network, trajectory, states)
    for copy in range(3):
        one = slice(copy, copy + 1)
        single = DenoisingState(states.state_ids[:, one], states.loss_mask[:, one], torch.ones(10).long())
        alone, _ = logits_at_states(network, trajectory, single)
        torch.testing.assert_close(together[:, one], alone, rtol=1e-10, atol=1e-10, equal_nan=True)


def test_block_size_one_is_causal_conditioning_with_a_mask_at_the_predicted_position() -> None:
    network, _, trajectory = roll_out(1)
    states = all_states(trajectory, MASK_TOKEN_ID)
    logits, _ = logits_at_states(network, trajectory, states)
    for row, position in trajectory.is_response.nonzero().tolist():
        tokens = F.pad(trajectory.token_ids[row, :position], (0, 1), value=MASK_TOKEN_ID)[None]
        zeros, positions = torch.zeros_like(tokens), torch.arange(position + 1)[None]
        causal = network(tokens, TokenAttributes(zeros, zeros, positions, positions))
        torch.testing.assert_close(logits[row, 0, position], causal[0, -1], rtol=1e-10, atol=1e-10)
