"""Random masking: the asked-for probability, at least one mask in a block, nothing that is not eligible."""

import torch

from nemo_opdlm.diffusion.noising import random_block_mask


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def test_masks_eligible_positions_only_and_at_least_one_of_them() -> None:
    eligible = draw(200, 3, 4) < 0.5
    for ratio in (0.0, 0.1, 0.5, 1.0):
        masked = random_block_mask(eligible, torch.full((200, 3), ratio), draw(200, 3, 4, seed=1))
        assert not (masked & ~eligible).any()
        assert torch.equal(masked.any(-1), eligible.any(-1))
    assert torch.equal(masked, eligible), "probability 1 masks everything"


def test_probability_zero_masks_one_position_anywhere() -> None:
    num = 4000
    eligible = torch.tensor([True, False, True, True]).expand(num, -1)
    masked = random_block_mask(eligible, torch.zeros(num), draw(num, 4))
    assert (masked.sum(-1) == 1).all()
    torch.testing.assert_close(masked.float().mean(0), torch.tensor([1, 0, 1, 1]) / 3, atol=0.04, rtol=0)


def test_expected_share_with_a_uniform_ratio() -> None:
    # E|masked| / b over t ~ U(0, 1) is 1/2, plus one position where none was drawn: P(none) / b = 1 / (b (b + 1)).
    num, size = 20000, 4
    masked = random_block_mask(torch.ones(num, size, dtype=torch.bool), draw(num, seed=2), draw(num, size, seed=3))
    assert abs(masked.float().mean() - (0.5 + 1 / (size * (size + 1)))) < 0.01
