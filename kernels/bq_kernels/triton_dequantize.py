"""Dequantization of tiled weights to a dense matrix, W′ or W′ Q: the rotation folded back while a row is on chip.

A product with many rows of x is worth it. Measured on an H100 with 2-bit weights 8192² in groups of 128: this, without
a rotation, and cuBLAS take 232 µs for 1,024 rows, where cuBLAS on 16-bit weights takes 178, and 874 µs for 4,096,
where it takes 816. Rotating x before costs 9 µs more for 1,024 rows, 55 µs for 4,096.

Folded, the rotation costs the same for any number of rows: 2 instructions per weight and butterfly layer, beside a
store that memory holds back. No GPU has timed it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gpu import gpu_of
from .tiles import TILE_K as _TILE_K
from .tiles import tile_bits, unit_of
from .triton_rotate import butterfly, mix_runs, single_pass_config
from .triton_unpack import (
    TILE_K,
    TILE_N,
    WORDS_PER_BIT,
    down_scale,
    gather_codes,
    load_words,
    midrise,
    operands,
    split_words,
)


@triton.jit
def _dequantize_kernel(
    tiles_ptr,
    scales_ptr,
    zeros_ptr,  # None: mid-rise levels
    cos_sin_ptr,  # None: no rotation; else rotation blocks divide a tile
    out_ptr,
    K,
    N,
    stride_sg,  # of scales and zeros, from group to group
    BITS: tl.constexpr,
    UNIT: tl.constexpr,  # columns that share a scale in a tile
    UNITS_PER_GROUP: tl.constexpr,
    LAYERS: tl.constexpr,  # k of the rotation
    PDL: tl.constexpr,
):
    UNITS: tl.constexpr = TILE_K // UNIT
    BLOCK_SIZE: tl.constexpr = 1 << LAYERS
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    pid_k = tl.program_id(0)
    pid_n = tl.program_id(1).to(tl.int64)
    offs_n = pid_n * TILE_N + tl.arange(0, TILE_N)
    tile_ptr = tiles_ptr + (pid_n * tl.cdiv(K, TILE_K) + pid_k) * (WORDS_PER_BIT * BITS)
    words = split_words(load_words(tile_ptr, None, BITS, 1, 0), 1, BITS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    start_k = pid_k * TILE_K + tl.arange(0, UNITS) * UNIT
    # the last tile may hold fewer columns than units
    offs_g = tl.minimum(start_k, K - 1) // (UNIT * UNITS_PER_GROUP) * stride_sg
    offs_sg = offs_g[None, :] + offs_n[:, None]
    weight = operands(words, 0, TILE_K // 8, BITS, dtype).to(tl.float32) * down_scale(dtype)
    weight = tl.reshape(weight, [TILE_N, UNITS, UNIT])
    if zeros_ptr is not None:
        weight -= (tl.load(zeros_ptr + offs_sg).to(tl.float32) - midrise(BITS))[:, :, None]
    weight *= tl.load(scales_ptr + offs_sg).to(tl.float32)[:, :, None]
    weight = tl.reshape(weight, [TILE_N, TILE_K])
    if cos_sin_ptr is not None:
        table_ptr = cos_sin_ptr + pid_k.to(tl.int64) * (TILE_K * LAYERS)
        num_pairs = tl.minimum(TILE_K, K - pid_k * TILE_K) // 2
        weight = butterfly(weight, table_ptr, num_pairs, LAYERS, BLOCK_SIZE, 0, LAYERS, 1, True)
    offs_k = pid_k * TILE_K + tl.arange(0, TILE_K)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    tl.store(out_ptr + offs_n[:, None] * K + offs_k[None, :], weight.to(dtype), mask=mask)


@triton.jit
def _dequantize_rows_kernel(
    tiles_ptr,
    scales_ptr,
    zeros_ptr,  # None: mid-rise levels
    cos_sin_ptr,
    mix_ptr,
    out_ptr,
    K,
    N,
    stride_sg,  # of scales and zeros, from group to group
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LAYERS: tl.constexpr,  # k of the rotation
    RUNS: tl.constexpr,  # m
    WIDTH: tl.constexpr,  # the block size, or the next power of two
    BLOCK_N: tl.constexpr,  # rows of W per program
    PDL: tl.constexpr,
):
    BLOCK_SIZE: tl.constexpr = RUNS << LAYERS
    pid_block = tl.program_id(1)
    # the first axis of the grid: others end at 65,535, and a vocabulary has more rows
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    position = tl.arange(0, WIDTH)[None, :]
    offs_k = pid_block * BLOCK_SIZE + position
    mask = (position < BLOCK_SIZE) & (offs_n < N)
    weight = gather_codes(tiles_ptr, offs_n, offs_k, K, mask, BITS).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    offs_sg = offs_k // GROUP * stride_sg + offs_n
    if zeros_ptr is not None:
        weight -= tl.load(zeros_ptr + offs_sg, mask=mask, other=0.0).to(tl.float32)
    else:
        weight -= midrise(BITS)
    weight *= tl.load(scales_ptr + offs_sg, mask=mask, other=0.0).to(tl.float32)
    if RUNS > 1:
        weight = mix_runs(weight, mix_ptr + pid_block.to(tl.int64) * (RUNS * RUNS), RUNS, 1 << LAYERS, True)
    if LAYERS > 0:
        table_ptr = cos_sin_ptr + pid_block.to(tl.int64) * (LAYERS * BLOCK_SIZE)
        weight = butterfly(weight, table_ptr, BLOCK_SIZE // 2, LAYERS, BLOCK_SIZE, 0, LAYERS, 1, True)
    tl.store(out_ptr + offs_n * K + offs_k, weight.to(out_ptr.dtype.element_ty), mask=mask)


def fits_tile(cos_sin: torch.Tensor, mix: torch.Tensor) -> bool:
    """Whether a tile of 128 columns holds rotation blocks whole: powers of two up to 128."""
    return mix.shape[-1] == 1 and 1 << cos_sin.shape[2] <= _TILE_K


def dequantize(
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    cos_sin: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
) -> torch.Tensor:
    """W′ = s·(q − z), or W′ Q where tables are given, as [N, K] in `dtype`; arguments as `tiles.dequantize`.

    Float32 inside, rounded once. Rotation blocks that a tile holds are folded back in the tile. For others, up to the
    full width, a program gathers the codes of whole blocks of a few rows.
    """
    group_size = in_features // scales.shape[0]
    out = torch.empty(out_features, in_features, dtype=dtype, device=tiles.device)
    gpu, bits = gpu_of(tiles), tile_bits(tiles)
    packed, sizes = (tiles, scales, zeros), (in_features, out_features, scales.stride(0))
    with torch.cuda.device_of(tiles):  # Triton launches on the current device
        if cos_sin is None or fits_tile(cos_sin, mix):
            unit, layers = unit_of(group_size), 0 if cos_sin is None else cos_sin.shape[2]
            _dequantize_kernel[tiles.shape[1], tiles.shape[0]](
                *packed,
                cos_sin.contiguous() if layers else None,
                out,
                *sizes,
                BITS=bits,
                UNIT=unit,
                UNITS_PER_GROUP=group_size // unit,
                LAYERS=layers,
                PDL=gpu.pdl,
                num_warps=4,
                **gpu.options,
            )
        else:
            blocks, _, layers, _ = cos_sin.shape
            config = single_pass_config(out_features, mix.shape[-1] << layers)
            _dequantize_rows_kernel[triton.cdiv(out_features, config["BLOCK_M"]), blocks](
                *packed,
                cos_sin.contiguous(),
                mix.contiguous(),
                out,
                *sizes,
                BITS=bits,
                GROUP=group_size,
                LAYERS=layers,
                RUNS=config["RUNS"],
                WIDTH=config["PADDED_HEIGHT"],
                BLOCK_N=config["BLOCK_M"],
                PDL=gpu.pdl,
                num_warps=config["num_warps"],
                **gpu.options,
            )
    return out
