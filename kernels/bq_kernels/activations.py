"""8-bit activations of a prefill, in plain torch: rotation and rounding, and the product with packed weights.

A rotated token is flat: no feature is much larger than the others, so one scale per token suffices. The tensor cores
multiply int8 at twice the rate of 16 bits.
"""

from __future__ import annotations

import torch

from .reference import apply_rotation

LARGEST_INT8 = 127  # symmetric: −128 is not used
# A layer with few tokens is bound by its weights or by latency, and int8 has nothing to gain: the measured launch table
# has its GEMM kernel up to this number
DECODE_ROWS = 256


def rounds_activations(rows: int, activation_bits: int) -> bool:
    """Whether a linear layer rounds its input to int8: where that is asked for, in a prefill."""
    return activation_bits == 8 and rows > DECODE_ROWS


def round_to_int8(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round rows to int8, with one scale per row, the largest magnitude over 127.

    Args:
        y: [..., K], any float dtype.

    Returns:
        int8 [..., K] and float32 [..., 1]; y ≈ scale · int8, off by at most half a scale. A row of zeros has the scale
        0. A row with NaN or infinity has an infinite scale, so that what is computed from it is not finite either.
    """
    y = y.float()
    largest = torch.where(y.isnan(), torch.inf, y.abs()).amax(-1, keepdim=True)
    inverse = torch.where(largest > 0, LARGEST_INT8 / largest, 0.0)
    return (y * inverse).round().nan_to_num(0.0).to(torch.int8), largest / LARGEST_INT8


def rotate_to_int8(
    x: torch.Tensor, cos_sin: torch.Tensor | None, mix: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate tokens and round them to int8; float32 in between.

    Args:
        x: [M, K], any float dtype.
        cos_sin, mix: tables of Q from `reference.givens_tables`; None for no rotation.

    Returns:
        int8 [M, K], and the scale of every token, float32 [M, 1]; see `round_to_int8`.
    """
    return round_to_int8(x if cos_sin is None else apply_rotation(x.float(), cos_sin, mix))
