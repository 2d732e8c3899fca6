"""The packed linear for a batch: tiles of x and of packed weights meet on the matrix unit."""

from __future__ import annotations

import triton
import triton.language as tl

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
def _gemm_kernel(
    x,
    tiles,
    scales,
    zeros,  # None: mid-rise levels
    bias,  # or None
    out,
    partial,
    counters,
    rows,
    x_stride,
    in_features,
    out_features,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,  # columns of one product: they share a scale
    UNITS_A_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,  # of 64 outputs
    SPLIT: tl.constexpr,  # programs that share the columns
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    BLOCK_N: tl.constexpr = TILES * TILE_ROWS
    UNITS: tl.constexpr = TILE_COLUMNS // UNIT
    PAIRS: tl.constexpr = UNIT // 8
    dtype: tl.constexpr = x.dtype.element_ty
    n_tiles = tl.cdiv(out_features, TILE_ROWS)
    k_tiles = tl.cdiv(in_features, TILE_COLUMNS)
    stride = n_tiles * TILE_ROWS
    first = tl.program_id(0) * TILES
    n = first * TILE_ROWS + tl.arange(0, BLOCK_N)
    inside = n < out_features
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    words_of_row = k_tiles.to(tl.int64) * (TILE_WORDS * BITS)
    here = tiles + first * words_of_row
    exists = first + tl.arange(0, TILES)[:, None] < n_tiles
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    acc = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    each = tl.cdiv(k_tiles, SPLIT)
    begin = tl.program_id(2) * each
    for k_tile in tl.range(begin, tl.minimum(begin + each, k_tiles), num_stages=STAGES):
        words = load_words(here + k_tile * (TILE_WORDS * BITS), exists, BITS, TILES, words_of_row)
        split = split_words(words, TILES, BITS)
        for part in tl.static_range(UNITS):
            start = k_tile * TILE_COLUMNS + part * UNIT
            column = start + tl.arange(0, UNIT)[None, :]
            mask = (row < rows) & (column < in_features)
            block = tl.load(x + row * x_stride + column, mask=mask, other=0.0)
            # the last tile may hold fewer columns than units
            group = tl.minimum(start, in_features - 1) // (UNIT * UNITS_A_GROUP) * stride
            scale = tl.load(scales + group + n, mask=inside, other=0.0).to(tl.float32)
            levels = operands(split, part * PAIRS, PAIRS, BITS, dtype)
            if zeros is not None:  # rounded to the dtype of x: sums of x beside the product would not fit the registers
                zero = tl.load(zeros + group + n, mask=inside, other=0.0).to(tl.float32) - centre(BITS)
                levels -= (zero / down_scale(dtype)).to(dtype)[:, None]
            product = tl.dot(levels, tl.trans(block), input_precision="ieee")
            acc += product * scale[:, None]
    acc *= down_scale(dtype)
    if SPLIT > 1:
        # The last program to finish adds up what all left, always in the same order; see triton_decode.py
        program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        cell = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        left = partial + program.to(tl.int64) * (SPLIT * BLOCK_N * BLOCK_M) + cell
        tl.store(left + tl.program_id(2) * (BLOCK_N * BLOCK_M), acc)
        tl.debug_barrier()
        if tl.atomic_add(counters + program, 1, sem="acq_rel") < SPLIT - 1:
            return
        tl.store(counters + program, 0)  # ready for the next launch
        acc = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
        for part in range(SPLIT):
            # past the first-level cache, which does not see what other programs wrote
            acc += tl.load(left + part * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
    if bias is not None:
        acc += tl.load(bias + n, mask=inside, other=0.0).to(tl.float32)[:, None]
    result = tl.trans(acc).to(out.dtype.element_ty)
    tl.store(out + row * out_features + n[None, :], result, mask=(row < rows) & inside[None, :])


def launch_config(bits: int, group: int, block_m: int, tiles: int, split: int, stages: int, warps: int) -> dict:
    """Compile-time arguments and compiler options of the GEMM kernel.

    Args:
        bits: bits per code.
        group: columns that share a scale, a multiple of 32.
        block_m: rows of x in a program, a power of two from 16.
        tiles: tiles of 64 outputs in a program, 1 or 2.
        split: programs that share the columns of a tile.
        stages: loads in flight.
        warps: 4 or 8.
    """
    unit = unit_of(group)
    return {
        "BITS": bits,
        "UNIT": unit,
        "UNITS_A_GROUP": group // unit,
        "BLOCK_M": block_m,
        "TILES": tiles,
        "SPLIT": split,
        "STAGES": stages,
        "num_warps": warps,
        "num_stages": stages,
    }
