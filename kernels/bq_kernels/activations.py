"""8-bit activations of a prefill, in plain torch: rotation and rounding to int8.

Every token has one scale per unit of columns, those of a group of the weights or a part of it: one scale per token cost
0.6 % of perplexity, one per token and group at most 0.11 % (docs/results.md). The tensor cores multiply int8 at twice
the rate of 16 bits.
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
    x: torch.Tensor, cos_sin: torch.Tensor | None, mix: torch.Tensor | None, unit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate tokens and round them to int8, unit by unit; float32 in between.

    Args:
        x: [M, K], any float dtype.
        cos_sin, mix: tables of Q from `reference.givens_tables`; None for no rotation.
        unit: columns that share a scale; they divide K.

    Returns:
        int8 [M, K], and scales, float32 [K/unit, M]: a product reads those of many tokens and one unit, side by side.
        See `round_to_int8` for their values.
    """
    y = x if cos_sin is None else apply_rotation(x.float(), cos_sin, mix)
    codes, scales = round_to_int8(y.unflatten(-1, (-1, unit)))
    return codes.flatten(-2), scales.squeeze(-1).T.contiguous()


def from_int8(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Rotated tokens, float32 [M, K], of what `rotate_to_int8` returns."""
    return (codes.unflatten(-1, (len(scales), -1)) * scales.T[..., None]).flatten(-2)
