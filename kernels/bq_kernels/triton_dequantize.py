"""Tiled weights to a dense matrix: with enough rows a dense product is worth what this costs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gpu import gpu_of
from .tiles import WORDS
from .triton_codes import (
    TILE_COLUMNS,
    TILE_ROWS,
    TILE_WORDS,
    centre,
    down_scale,
    load_words,
    operands,
    split_words,
    unit_of,
)


@triton.jit
def _dequantize_kernel(
    tiles,
    scales,
    zeros,  # None: mid-rise levels
    out,
    in_features,
    out_features,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS_A_GROUP: tl.constexpr,
    PDL: tl.constexpr,
):
    PAIRS: tl.constexpr = UNIT // 8
    dtype: tl.constexpr = out.dtype.element_ty
    stride = tl.cdiv(out_features, TILE_ROWS) * TILE_ROWS
    k_tile = tl.program_id(0)
    n = tl.program_id(1).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    tile = tl.program_id(1).to(tl.int64) * tl.cdiv(in_features, TILE_COLUMNS) + k_tile
    split = split_words(load_words(tiles + tile * (TILE_WORDS * BITS), None, BITS, 1, 0), 1, BITS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for part in tl.static_range(TILE_COLUMNS // UNIT):
        start = k_tile * TILE_COLUMNS + part * UNIT
        group = tl.minimum(start, in_features - 1) // (UNIT * UNITS_A_GROUP) * stride
        scale = tl.load(scales + group + n).to(tl.float32)
        weight = operands(split, part * PAIRS, PAIRS, BITS, dtype).to(tl.float32) * down_scale(dtype)
        if zeros is not None:
            weight -= (tl.load(zeros + group + n).to(tl.float32) - centre(BITS))[:, None]
        column = start + tl.arange(0, UNIT)[None, :]
        mask = (n < out_features)[:, None] & (column < in_features)
        tl.store(out + n[:, None] * in_features + column, (weight * scale[:, None]).to(dtype), mask=mask)


def dequantize(
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """W′ = s·(q − z) as [N, K] in `dtype`, rounded once; arguments as from `tiles.tile`."""
    group = in_features // scales.shape[0]
    unit = unit_of(group)
    out = torch.empty(out_features, in_features, dtype=dtype, device=tiles.device)
    with torch.cuda.device_of(tiles):  # Triton launches on the current device
        _dequantize_kernel[tiles.shape[1], tiles.shape[0]](
            tiles,
            scales,
            zeros,
            out,
            in_features,
            out_features,
            BITS=tiles.shape[2] // WORDS,
            UNIT=unit,
            UNITS_A_GROUP=group // unit,
            PDL=gpu_of(tiles).early_launch,
            num_warps=4,
            **gpu_of(tiles).options,
        )
    return out
