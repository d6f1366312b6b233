"""Which prompts a step uses: against a slow loop, and the laws that make resume and data parallelism free."""

from itertools import islice

import pytest
import torch

from nemo_opdlm.data.schedule import PromptSchedule
from nemo_opdlm.rng import Stream, permutation


def endless_stream(seed, n):
    epoch = 0
    while True:
        yield from permutation(seed, Stream.SHUFFLE, epoch, n).tolist()
        epoch += 1


@pytest.mark.parametrize(("n", "m"), [(10, 4), (12, 4), (3, 8), (1, 1), (7, 7), (5, 1)])
def test_steps_are_sequential_chunks_of_a_stream_reshuffled_every_epoch(n, m):
    schedule = PromptSchedule(dataset_size=n, num_prompts=m, seed=3)
    steps = 2 * schedule.steps_per_epoch + 2
    expected = list(islice(endless_stream(3, n), steps * m))
    batches = [schedule.indices(step) for step in range(1, steps + 1)]
    assert torch.cat([batch.dataset_indices for batch in batches]).tolist() == expected
    assert torch.cat([batch.prompt_numbers for batch in batches]).tolist() == list(range(steps * m))


def test_the_published_set_takes_483_steps_and_the_last_one_is_topped_up_from_the_reshuffled_pool():
    schedule = PromptSchedule(dataset_size=61_816, num_prompts=128)
    assert schedule.steps_per_epoch == 483
    last = schedule.indices(483).dataset_indices
    left_over = 61_816 % 128
    assert last[left_over:].tolist() == permutation(0, Stream.SHUFFLE, 1, 61_816)[: 128 - left_over].tolist()


def test_an_epoch_uses_every_prompt_once_in_an_order_of_its_own():
    schedule = PromptSchedule(dataset_size=12, num_prompts=4, seed=1)
    epochs = [[i for s in range(e * 3 + 1, e * 3 + 4) for i in schedule.indices(s).dataset_indices] for e in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len({tuple(map(int, epoch)) for epoch in epochs}) == 3


def test_steps_do_not_depend_on_what_was_asked_before():
    fresh = PromptSchedule(dataset_size=50, num_prompts=8, seed=5).indices(9)
    used = PromptSchedule(dataset_size=50, num_prompts=8, seed=5)
    for step in (9, 2, 30):
        used.indices(step)
    assert torch.equal(used.indices(9).dataset_indices, fresh.dataset_indices)


def test_the_seed_changes_the_order():
    orders = [PromptSchedule(dataset_size=40, num_prompts=40, seed=s).indices(1).dataset_indices for s in range(4)]
    assert len({tuple(order.tolist()) for order in orders}) == 4


def test_copies_of_a_prompt_stand_side_by_side_with_sample_ids_of_their_own():
    one = PromptSchedule(dataset_size=10, num_prompts=4, seed=2)
    three = PromptSchedule(dataset_size=10, num_prompts=4, num_responses_per_prompt=3, seed=2)
    seen = set()
    for step in range(1, 8):
        batch = three.indices(step)
        assert len(batch) == 12
        assert batch.dataset_indices.tolist() == one.indices(step).dataset_indices.repeat_interleave(3).tolist()
        assert (batch.sample_ids // 3).tolist() == batch.prompt_numbers.tolist()
        seen.update(batch.sample_ids.tolist())
    assert seen == set(range(7 * 12)), "sample ids never repeat, not even when a prompt comes back"


def test_shards_are_a_partition_and_every_update_takes_the_same_samples_on_every_layout():
    batch = PromptSchedule(dataset_size=10, num_prompts=8, num_responses_per_prompt=2, seed=2).indices(3)
    per_update = 8
    for dp_size in (1, 2, 4, 8):
        shards = [batch.shard(rank, dp_size) for rank in range(dp_size)]
        local = per_update // dp_size
        for update in range(len(batch) // per_update):
            trained = [i for s in shards for i in s.sample_ids[update * local : (update + 1) * local].tolist()]
            expected = batch.sample_ids[update * per_update : (update + 1) * per_update].tolist()
            assert sorted(trained) == expected
        for shard in shards:
            rows = shard.sample_ids - batch.sample_ids[0]
            assert torch.equal(shard.dataset_indices, batch.dataset_indices[rows])
            assert torch.equal(shard.prompt_numbers, batch.prompt_numbers[rows])


def test_impossible_requests_are_refused():
    schedule = PromptSchedule(dataset_size=10, num_prompts=6)
    with pytest.raises(ValueError, match="count from 1, got 0"):
        schedule.indices(0)
    with pytest.raises(ValueError, match="6 samples per rollout step do not divide over 4"):
        schedule.indices(1).shard(0, 4)
    for rank, size in ((2, 2), (-1, 2), (0, 0)):
        with pytest.raises(ValueError, match="dp_rank must be in"):
            schedule.indices(1).shard(rank, size)
    for name in ("dataset_size", "num_prompts", "num_responses_per_prompt"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            PromptSchedule(**({"dataset_size": 1, "num_prompts": 1} | {name: 0}))
