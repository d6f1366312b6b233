"""Who answers which prompts, and who trains on which records."""

import torch

from nemo_opdlm.diffusion.layout import share_of_columns
from nemo_opdlm.megatron.exchange import respond_together
from nemo_opdlm.megatron.parallel import initialize
from nemo_opdlm.models.distiller import rows_of_rank
from nemo_opdlm.testing.trajectories import random_trajectory


def test_records_come_back_in_the_order_of_the_prompts() -> None:
    trajectory = random_trajectory(9, 4)
    asked: list[int] = []

    def respond(rows: torch.Tensor) -> object:
        asked.extend(rows.tolist())
        return trajectory.index(rows)

    found = respond_together(respond, trajectory.response_len, initialize())  # type: ignore[arg-type]
    assert asked != sorted(asked) and torch.equal(found.sample_ids, trajectory.sample_ids)


def test_data_parallel_ranks_share_out_every_update_by_length() -> None:
    trajectory = random_trajectory(24, 4)
    shares = [rows_of_rank(trajectory, 8, rank, 2).view(3, 4) for rank in range(2)]
    lengths = trajectory.prompt_len + trajectory.response_len
    for update in range(3):
        rows = torch.cat([share[update] for share in shares])
        assert sorted(rows.tolist()) == list(range(8 * update, 8 * update + 8))
        first, second = (lengths[share[update]] for share in shares)
        assert bool((first <= second).all()) and bool((first[1:] >= second[:-1]).all())


def test_context_parallel_ranks_cut_a_row_into_equal_parts_without_overlap() -> None:
    for num_ranks in (1, 2, 3):
        width = 4 * 2 * num_ranks
        shares = [share_of_columns(width, rank, num_ranks) for rank in range(num_ranks)]
        assert {len(share) for share in shares} == {width // num_ranks}
        assert sorted(torch.cat(shares).tolist()) == list(range(width))
        # A piece from the front and its mirror image: the positions of every rank have the same mean.
        assert {float(share.double().mean()) for share in shares} == {(width - 1) / 2}
