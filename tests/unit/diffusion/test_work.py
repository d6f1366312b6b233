"""Closed forms of what passes through a network, against counting one by one."""

import pytest

from nemo_opdlm.diffusion.layout import two_stream_rows
from nemo_opdlm.diffusion.masks import PADDING_DOCUMENT, AttentionRule, dense
from nemo_opdlm.diffusion.remasking import RemaskingStrategy
from nemo_opdlm.diffusion.sampler import rollout
from nemo_opdlm.diffusion.state_selection import all_states, one_state_per_block
from nemo_opdlm.diffusion.trajectory import Trajectory
from nemo_opdlm.diffusion.work import Work, rollout_work, training_work
from nemo_opdlm.testing.fake_denoiser import FakeDenoiser, queries
from nemo_opdlm.testing.trajectories import MASK_TOKEN_ID, fake_denoiser, random_requests, rollout_settings


def rolled_out(block_size: int, num_rows: int = 12, late_reads: bool = False) -> tuple[Trajectory, FakeDenoiser]:
    denoiser = fake_denoiser(block_size, -1.0)
    settings = rollout_settings(block_size, RemaskingStrategy.LOW_CONFIDENCE_DYNAMIC, block_size)
    requests = random_requests(num_rows, block_size)
    return rollout(denoiser, requests, settings, late_reads=late_reads), denoiser


def totals(work: Work) -> list[int]:
    found: list[int] = work.stack().sum(1).tolist()
    return found


@pytest.mark.parametrize("late_reads", [False, True])
@pytest.mark.parametrize("block_size", [1, 2, 4, 8])
def test_a_rollouts_work_is_what_the_network_was_asked(block_size: int, late_reads: bool) -> None:
    trajectory, denoiser = rolled_out(block_size, late_reads=late_reads)
    num_tokens = num_pairs = num_logits = 0
    for call in denoiser.prefills + denoiser.forwards:
        for _, _, positions in queries(call):
            num_tokens += len(positions)
            num_pairs += sum(block_size * (position // block_size + 1) for position in positions)
    for call in denoiser.forwards:
        num_logits += sum(tokens[-block_size:].count(MASK_TOKEN_ID) for _, tokens, _ in queries(call))
    assert totals(rollout_work(trajectory)) == [num_tokens, num_pairs, num_logits]


@pytest.mark.parametrize("has_causal_copy", [False, True])
@pytest.mark.parametrize("block_size", [1, 4])
def test_a_training_passs_work_is_what_its_rows_and_masks_hold(block_size: int, has_causal_copy: bool) -> None:
    trajectory, _ = rolled_out(block_size)
    for states in (
        one_state_per_block(trajectory, MASK_TOKEN_ID, num_states=2, seed=0, step=1),
        all_states(trajectory, MASK_TOKEN_ID),
    ):
        rows = two_stream_rows(trajectory, states, has_causal_copy=has_causal_copy)
        is_token = rows.attributes.document_ids != PADDING_DOCUMENT
        pairs = dense(AttentionRule.BLOCK_DIFFUSION, rows.attributes, rows.attributes)[:, 0] & is_token[:, :, None]
        expected = [int(x.sum()) for x in (is_token, pairs, rows.loss_mask | rows.causal_mask)]
        assert totals(training_work(trajectory, states, has_causal_copy)) == expected
