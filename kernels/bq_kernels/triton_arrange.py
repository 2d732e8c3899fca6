"""Rotates x and arranges it for the decode kernel on mma.sync, in one launch (operands.py says how, in plain torch).

With an RMSNorm in front, it normalizes x first (triton_norm.py), a row per program then.

That kernel asks for its weights while this one runs. Tables of the rotation are read before the wait for the kernel in
front, on which they do not depend.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gpu import Gpu
from .operands import EXACT_EXPONENT as _EXACT_EXPONENT
from .operands import EXPONENT as _EXPONENT
from .operands import LARGEST_EXPONENT as _LARGEST_EXPONENT
from .operands import ROWS_PER_MMA
from .tiles import TILE_K as _TILE_K
from .triton_norm import NO_NORM, Norm, normalize
from .triton_rotate import rotate_pairs

TILE_K = tl.constexpr(_TILE_K)
EXPONENT, EXACT_EXPONENT = tl.constexpr(_EXPONENT), tl.constexpr(_EXACT_EXPONENT)
LARGEST_EXPONENT = tl.constexpr(_LARGEST_EXPONENT)
WIDEST_BLOCK = 1024  # of a rotation whose tables fit the registers beside x
TILE_ELEMENTS, THREAD_ELEMENTS = 1024, 8  # of x, per program and thread


@triton.jit
def _power_of_two(exponent):
    """2^exponent, −126 to 127, in float32."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _place(column, BITS: tl.constexpr):
    """Of a column of a tile: the p of its codes, and its place among the arranged columns (operands.field_place)."""
    pair, t, side = column // 8, column // 2 % 4, column % 2
    if BITS == 4:
        position = 3 + pair % 2 * 4
    else:
        position = 2 + (pair + 3) % 4 * 2
        side = side ^ (pair % 8 == 0).to(tl.int32)
    return position, pair // 4 * 32 + t * 8 + pair % 4 * 2 + side


@triton.jit
def _arrange_kernel(
    x_ptr,
    residual_ptr,  # or None
    norm_weight_ptr,  # None: x is not normalized; else BLOCK_M is 1
    total_ptr,
    epsilon,
    cos_sin_ptr,  # None: x is already rotated
    out_ptr,
    sums_ptr,
    M,
    stride_xm,
    K,
    k_tiles,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,
    LOG_ROTATION_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,  # columns per program, a multiple of the block and of a tile
    BLOCK_M: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
):
    UNITS: tl.constexpr = WIDTH // UNIT
    start_k = tl.program_id(0) * WIDTH
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_k = start_k + tl.arange(0, WIDTH)[None, :]
    tables = ()
    if cos_sin_ptr is not None:
        PAIRS: tl.constexpr = (1 << LOG_ROTATION_BLOCK) // 2
        pair = tl.arange(0, WIDTH // 2)
        table_ptr = cos_sin_ptr + start_k * LOG_ROTATION_BLOCK
        table_ptrs = table_ptr + pair // PAIRS * (2 * LOG_ROTATION_BLOCK * PAIRS) + pair % PAIRS
        mask = start_k + 2 * pair < K
        for j in tl.static_range(LOG_ROTATION_BLOCK):
            cos = tl.load(table_ptrs + j * PAIRS, mask=mask, other=1.0)
            sin = tl.load(table_ptrs + (LOG_ROTATION_BLOCK + j) * PAIRS, mask=mask, other=0.0)
            tables = tables + (cos, sin)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if norm_weight_ptr is not None:
        columns = start_k + tl.arange(0, WIDTH)
        pointers = x_ptr, residual_ptr, norm_weight_ptr, total_ptr
        x = normalize(*pointers, epsilon, tl.program_id(1) * K, columns, columns < K, K, True)[None, :]
    else:
        x = tl.load(x_ptr + offs_m * stride_xm + offs_k, mask=(offs_m < M) & (offs_k < K), other=0.0).to(tl.float32)
    if cos_sin_ptr is not None:
        for j in tl.static_range(LOG_ROTATION_BLOCK):
            x = rotate_pairs(x, tables[2 * j], tables[2 * j + 1], 1 << j)

    # a power of two per unit: its exponent from that of the largest magnitude, 0 where that is not finite
    units = tl.reshape(x, [BLOCK_M, UNITS, UNIT])
    largest = tl.max(tl.abs(units), axis=2)
    biased = largest.to(tl.int32, bitcast=True) >> 23
    exponent = tl.where(biased == 255, 0, tl.minimum(LARGEST_EXPONENT + 127 - biased, 126))
    exponent = tl.where(largest > 0, exponent, 0)
    position, place = _place(offs_k % TILE_K, BITS)
    down = tl.zeros_like(position) - EXACT_EXPONENT if EXACT else position - 24
    up = tl.zeros_like(position) if EXACT else -EXPONENT - down
    up = tl.reshape(_power_of_two(up), [1, UNITS, UNIT])
    operands = (units * _power_of_two(exponent)[:, :, None] * up).to(tl.float16)
    out_ptrs = out_ptr + offs_m * (k_tiles * TILE_K) + offs_k // TILE_K * TILE_K + place
    tl.store(out_ptrs, tl.reshape(operands, [BLOCK_M, WIDTH]), mask=(offs_m < M) & (offs_k < k_tiles * TILE_K))
    sums = -tl.sum(operands.to(tl.float32) * tl.reshape(_power_of_two(down), [1, UNITS, UNIT]), axis=2)
    offs_u = start_k // UNIT + tl.arange(0, UNITS)[None, :]
    sums_ptrs = sums_ptr + (offs_u * SUM_ROWS + offs_m) * 2
    mask = (offs_m < M) & (offs_u < k_tiles * (TILE_K // UNIT))
    tl.store(sums_ptrs, sums, mask=mask)
    tl.store(sums_ptrs + 1, _power_of_two(-exponent), mask=mask)


def fuses(cos_sin: torch.Tensor, mix: torch.Tensor) -> bool:
    """Whether the kernel applies a rotation itself: its blocks are a power of two, and not too wide."""
    return mix.shape[-1] == 1 and 1 < 1 << cos_sin.shape[2] <= WIDEST_BLOCK


def launch_config(
    rows: int, bits: int, unit: int, rotation_block: int, exact: bool, normalizes: bool
) -> dict[str, int]:
    """Compile-time arguments and compiler options of the kernel.

    Args:
        rows: rows of x, at least one.
        bits: bits per code.
        unit: columns that share a scale and a sum, 32, 64 or 128.
        rotation_block: block size of the rotation, a power of two up to WIDEST_BLOCK; 1 for none.
        exact: whether codes are centred before the product (operands.py).
        normalizes: whether x is normalized first: programs are wide then, since each of them reads the whole row.
    """
    width = max(_TILE_K, rotation_block, TILE_ELEMENTS if normalizes else 0)
    block_m = max(min(triton.next_power_of_2(rows), TILE_ELEMENTS // width), 1)
    return {
        "BITS": bits,
        "UNIT": unit,
        "LOG_ROTATION_BLOCK": rotation_block.bit_length() - 1,
        "WIDTH": width,
        "BLOCK_M": block_m,
        "SUM_ROWS": ROWS_PER_MMA * triton.cdiv(rows, ROWS_PER_MMA),
        "EXACT": exact,
        "num_warps": max(width * block_m // (32 * THREAD_ELEMENTS), 1),
    }


def rotate_and_arrange(
    x: torch.Tensor,
    cos_sin: torch.Tensor | None,
    bits: int,
    unit: int,
    exact: bool,
    gpu: Gpu,
    norm: Norm = NO_NORM,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Q x as the decode kernel on mma.sync reads it; float32 inside, rounded once.

    Args:
        x: [M, K], float16 or bfloat16, its last dimension contiguous.
        cos_sin: float32 [B, 2, k, b/2] of a rotation that `fuses`; None where x is already rotated.
        bits, unit, exact: as in `operands.arrange`.
        gpu: that of x.
        norm: applied to x before that; x is contiguous then.

    Returns:
        operands and sums of `operands.arrange`; rows of the sums past M are not written.
    """
    rows, in_features = x.shape
    k_tiles = triton.cdiv(in_features, _TILE_K)
    rotation_block = 1 if cos_sin is None else 1 << cos_sin.shape[2]
    config = launch_config(rows, bits, unit, rotation_block, exact, norm.weight is not None)
    operands = x.new_empty(rows, k_tiles * _TILE_K, dtype=torch.float16)
    sums = x.new_empty(k_tiles * _TILE_K // unit, config["SUM_ROWS"], 2, dtype=torch.float32)
    grid = triton.cdiv(in_features, config["WIDTH"]), triton.cdiv(rows, config["BLOCK_M"])
    arguments = x, *norm, cos_sin, operands, sums, rows, x.stride(0), in_features, k_tiles
    _arrange_kernel[grid](*arguments, **config, PDL=gpu.pdl, **gpu.options)
    return operands, sums
