"""The operands of the decode kernel on mma.sync (triton_mma.py), in plain torch: where codes lie, how x is arranged.

The kernel reads weights in the tiles of tiles.py. A code that is masked where it lies in a word is a number in half
precision already: fields below bit 11 are q·2ᵖ⁻²⁴ exactly, subnormal or with the smallest exponent. So the matrix unit
takes it after one AND, and x makes up for 2ᵖ: its columns come scaled by 2⁵⁻ᵖ. What this asks of x is done once, behind
the rotation:

- *Range*. Every unit of columns of every row is scaled by a power of two that brings its largest magnitude into
  [2¹¹, 2¹²), so that no finite x, float16 or bfloat16, leaves half precision at a factor of up to 8. What is lost below
  is at most 2⁻³³ of the unit's largest magnitude. The power is undone in float32.
- *Zero points*. Codes enter without theirs; z·Σx̂ of every unit is subtracted in float32 as the start of its sum.
- *Order*. A lane (g, t) of a warp owns columns 8i + 2t and 8i + 2t + 1 of a tile. Those of four i lie side by side, 16
  bytes, and next to those of the other t: a load of the four lanes takes 64 bytes in a row.

With `exact`, codes are centred and scaled to (q − z₀)·2⁻⁹ by a fused multiply-add per operand, as the other kernels do,
and columns of x keep their scale.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .tiles import FIELDS, TILE_K

PAIRS = TILE_K // 8  # pairs of columns of a lane and tile
EXPONENT, EXACT_EXPONENT = 19, 9  # sums are too small by 2 to that: 24 − 5, and that of (q − z₀)·2⁻⁹
LARGEST_EXPONENT = 11  # of a unit's largest magnitude
ROWS_PER_MMA = 8  # rows of x of one product


def field_place(width: int, field: int) -> tuple[int, int, bool]:
    """How the operand of a field is cut from its word.

    Args:
        width: bits per field, 2 or 4 (tiles.FIELDS).
        field: its number within a half of the word.

    Returns:
        rotation: bits by which the word is rotated to the right.
        position: lowest bit of the field in its half then, the p of q·2ᵖ.
        swapped: whether the rotation carries it to the other half of the word.
    """
    # two rotations serve all fields; of eight, 1 to 4 lie well as they are
    low, high = (0, 8) if width == 2 else (29, 5)
    rotation = low if field in ((1, 2, 3, 4) if width == 2 else (0, 1)) else high
    bit = (width * field - rotation) % 32
    return rotation, bit % 16, bit >= 16


def _columns(bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of every column of a tile: the p of its codes, and its place among the arranged columns."""
    width = FIELDS[bits][0]
    positions, order = [], []
    for column in range(TILE_K):
        pair, t, side = column // 8, column % 8 // 2, column % 2
        _, position, swapped = field_place(width, pair % (16 // width))
        positions.append(position)
        order.append(pair // 4 * 32 + t * 8 + pair % 4 * 2 + (side ^ swapped))
    return torch.tensor(positions), torch.tensor(order)


def arrange(x: torch.Tensor, bits: int, unit: int, exact: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """x as the decode kernel on mma.sync reads it.

    Args:
        x: [M, K], rotated, any float dtype.
        bits: bits per code.
        unit: columns per scale and sum, 32, 64 or 128.
        exact: whether codes are centred before the product.

    Returns:
        operands: float16 [M, 128·⌈K/128⌉], columns past K are 0.
        sums: float32 [⌈K/128⌉·128/unit, 8·⌈M/8⌉, 2], −Σx̂ of every unit at the scale of the products, and the power
            of two that undoes the unit's scale. Rows past M are 0.
    """
    rows, in_features = x.shape
    x = F.pad(x.float(), (0, -in_features % TILE_K)).unflatten(-1, (-1, unit))
    positions, order = (t.to(x.device) for t in _columns(bits))
    largest = x.abs().amax(-1, keepdim=True)
    exponent = LARGEST_EXPONENT + 1 - torch.frexp(largest).exponent
    exponent = torch.where(largest.isfinite() & (largest > 0), exponent, 0).clamp(max=126)
    down = torch.full_like(positions, -EXACT_EXPONENT) if exact else positions - 24
    down = torch.exp2(down.float()).reshape(-1, unit).repeat(x.shape[1] * unit // TILE_K, 1)
    up = 1.0 if exact else 2.0**-EXPONENT / down
    operands = (torch.ldexp(x, exponent) * up).half()
    sums = torch.stack([-(operands.float() * down).sum(-1), torch.exp2(-exponent[..., 0].float())], -1)
    arranged = torch.empty_like(operands).reshape(rows, -1, TILE_K)
    arranged[..., order] = operands.reshape(rows, -1, TILE_K)
    sums = F.pad(sums, (0, 0, 0, 0, 0, -rows % ROWS_PER_MMA)).transpose(0, 1).contiguous()
    return arranged.flatten(1), sums
