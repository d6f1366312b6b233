"""Context parallelism is for long rows: two ranks hold half the activations of a row of 2 x 8,192 tokens."""

import pytest
import torch

from nemo_opdlm.testing.ranks import Ranks
from tests.parallel.context_memory import update

LENGTH = 8_188


@pytest.mark.timeout(700)
def test_two_ranks_hold_half_the_activations_of_a_long_row(two_ranks: Ranks) -> None:
    """Measured: 1,018 MB on one rank, 528 MB (0.52 x) on each of two; 27 s on one rank of one thread."""
    torch.set_num_threads(1)
    whole, loss, _ = update(LENGTH, context_size=1)
    for peak, shared_loss, _ in two_ranks.run(update, LENGTH, 2):
        assert peak <= 0.6 * whole
        assert shared_loss == pytest.approx(loss, rel=1e-6)
