"""The packed linear for a batch: tiles of rotated x and of packed weights meet on the matrix unit."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import unit_of
from .triton_unpack import (
    TILE_K,
    TILE_N,
    WORDS_PER_BIT,
    down_scale,
    load_words,
    midrise,
    operands,
    rows_of_tiles,
    split_words,
)


@triton.jit
def _gemm_kernel(
    x_ptr,
    tiles_ptr,
    scales_ptr,
    zeros_ptr,  # None: mid-rise levels
    bias_ptr,  # or None
    out_ptr,
    partial_ptr,
    counters_ptr,
    M,
    stride_xm,
    K,
    N,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,  # columns per tl.dot; they share a scale
    UNITS_PER_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,  # tiles of 64 outputs per program
    SPLIT_K: tl.constexpr,  # programs that share the columns
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    BLOCK_N: tl.constexpr = TILES * TILE_N
    PAIRS: tl.constexpr = UNIT // 8
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pid_n, pid_m, pid_k = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k_tiles = tl.cdiv(K, TILE_K)
    tile_ptr, stride_tn, mask_tiles, offs_n, mask_n, stride_sg = rows_of_tiles(tiles_ptr, pid_n, N, K, TILES, BITS)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    acc = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    tiles_per_program = tl.cdiv(k_tiles, SPLIT_K)
    k_begin = pid_k * tiles_per_program
    for k_tile in tl.range(k_begin, tl.minimum(k_begin + tiles_per_program, k_tiles), num_stages=STAGES):
        words = load_words(tile_ptr + k_tile * (WORDS_PER_BIT * BITS), mask_tiles, BITS, TILES, stride_tn)
        words = split_words(words, TILES, BITS)
        for u in tl.static_range(TILE_K // UNIT):
            start_k = k_tile * TILE_K + u * UNIT
            offs_k = start_k + tl.arange(0, UNIT)[None, :]
            x = tl.load(x_ptr + offs_m * stride_xm + offs_k, mask=(offs_m < M) & (offs_k < K), other=0.0)
            # the last tile may hold fewer columns than units
            offs_g = tl.minimum(start_k, K - 1) // (UNIT * UNITS_PER_GROUP) * stride_sg
            scale = tl.load(scales_ptr + offs_g + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            weight = operands(words, u * PAIRS, PAIRS, BITS, dtype)
            if zeros_ptr is not None:
                # rounded to the dtype of x: sums of x beside the product would not fit the registers
                zero = tl.load(zeros_ptr + offs_g + offs_n, mask=mask_n, other=0.0).to(tl.float32) - midrise(BITS)
                weight -= (zero / down_scale(dtype)).to(dtype)[:, None]
            acc += tl.dot(weight, tl.trans(x), input_precision="ieee") * scale[:, None]
    acc *= down_scale(dtype)
    if SPLIT_K > 1:
        # The last program to finish adds up all partial sums, always in the same order; see triton_decode.py
        pid = pid_m * tl.num_programs(0) + pid_n
        offs_acc = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        partial_ptrs = partial_ptr + pid.to(tl.int64) * (SPLIT_K * BLOCK_N * BLOCK_M) + offs_acc
        tl.store(partial_ptrs + pid_k * (BLOCK_N * BLOCK_M), acc)
        tl.debug_barrier()
        if tl.atomic_add(counters_ptr + pid, 1, sem="acq_rel") < SPLIT_K - 1:
            return
        tl.store(counters_ptr + pid, 0)  # ready for the next launch
        acc = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
        for k in range(SPLIT_K):
            # .cg: past the first-level cache, which does not see what other programs wrote
            acc += tl.load(partial_ptrs + k * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + offs_m * N + offs_n[None, :]
    tl.store(out_ptrs, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=(offs_m < M) & mask_n[None, :])


def launch_config(
    bits: int, group_size: int, block_m: int, tiles: int, split_k: int, stages: int, warps: int
) -> dict[str, int]:
    """Compile-time arguments and compiler options of the GEMM kernel.

    Args:
        bits: bits per code.
        group_size: columns that share a scale, a multiple of 32.
        block_m: rows of x per program, a power of two from 16.
        tiles: tiles of 64 outputs per program, 1 or 2.
        split_k: programs that share the columns of a tile.
        stages: loads in flight.
        warps: 4 or 8.
    """
    unit = unit_of(group_size)
    return {
        "BITS": bits,
        "UNIT": unit,
        "UNITS_PER_GROUP": group_size // unit,
        "BLOCK_M": block_m,
        "TILES": tiles,
        "SPLIT_K": split_k,
        "STAGES": stages,
        "num_warps": warps,
        "num_stages": stages,
    }
