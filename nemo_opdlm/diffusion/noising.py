"""Random masking: noise that needs no trajectory, for SFT and the off-policy ablations."""

from torch import Tensor

# Above every uniform number: excludes a position from the search for the smallest.
_EXCLUDED = 2.0


def random_block_mask(eligible: Tensor, ratio: Tensor, uniform: Tensor) -> Tensor:
    """Mask each eligible position with the probability of its block, but at least one in every block that has any.

    Args:
        eligible: bool ``[..., b]``, positions that may be masked.
        ratio: mask probability of each block, ``[...]``; drawn from U(0, 1) by the caller.
        uniform: in [0, 1), one for each position, ``[..., b]``.

    Returns:
        bool ``[..., b]``.
    """
    uniform = uniform.masked_fill(~eligible, _EXCLUDED)
    is_masked = eligible & (uniform < ratio[..., None])
    lowest = uniform.argmin(-1, keepdim=True)
    forced = is_masked.scatter(-1, lowest, True) & eligible
    return is_masked.where(is_masked.any(-1, keepdim=True), forced)
