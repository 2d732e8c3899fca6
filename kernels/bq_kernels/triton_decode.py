"""The packed linear for few rows: a program keeps a slice of x, rotates it once, and streams weights past it."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import COLUMNS
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
from .triton_rotate import butterfly


@triton.jit
def _load_tiles(tiles, row, end, k_tile, k_tiles, CHUNKS: tl.constexpr, BITS: tl.constexpr):
    """Words of CHUNKS tiles side by side; nothing is read from row `end` on."""
    words = ()
    for chunk in tl.static_range(CHUNKS):
        tile = tiles + (row * k_tiles + k_tile + chunk).to(tl.int64) * (TILE_WORDS * BITS)
        one = tl.arange(0, 1)[:, None]
        exists = (k_tile + chunk + one < k_tiles) & (row + one < end)
        words = words + (load_words(tile, exists, BITS, 1, 0),)
    return words


@triton.jit
def _load_scales(scales, row, end, unit, units, stride, UNITS: tl.constexpr, UNITS_A_GROUP: tl.constexpr):
    """Scales of a tile's rows for UNITS units of columns; past row `end` those of the last row again, unused."""
    n = tl.minimum(row, end - 1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    parts = ()
    for u in tl.static_range(UNITS):
        group = tl.minimum(unit + u, units - 1) // UNITS_A_GROUP
        parts = parts + (tl.load(scales + group * stride + n),)
    return parts


@triton.jit
def _split_columns(x, LOG_PARTS: tl.constexpr):
    """[rows, columns] cut into 2^LOG_PARTS tensors side by side."""
    parts = (x,)
    for level in tl.static_range(LOG_PARTS):
        halves = ()
        for i in tl.static_range(1 << level):
            pairs = tl.reshape(parts[i], [x.shape[0], 2, x.shape[1] >> (level + 1)])
            low, high = tl.split(tl.permute(pairs, [0, 2, 1]))
            halves = halves + (low, high)
        parts = halves
    return parts


@triton.jit
def _decode_kernel(
    x,
    cos_sin,  # None: x is rotated already
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
    tiles_a_program,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,  # columns of one product: they share a scale
    UNITS_A_GROUP: tl.constexpr,
    LOG_BLOCK: tl.constexpr,  # of the rotation
    ONE_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLICE: tl.constexpr,  # columns that a program keeps
    LOG_UNITS: tl.constexpr,  # of a slice
    SLICES: tl.constexpr,
    SLICES_PADDED: tl.constexpr,
    REDUCE: tl.constexpr,  # columns that are reduced together
    PDL: tl.constexpr,
):
    CHUNKS: tl.constexpr = SLICE // TILE_COLUMNS
    UNITS: tl.constexpr = 1 << LOG_UNITS
    UNITS_A_CHUNK: tl.constexpr = TILE_COLUMNS // UNIT
    PAIRS: tl.constexpr = UNIT // 8
    dtype: tl.constexpr = x.dtype.element_ty
    n_tiles = tl.cdiv(out_features, TILE_ROWS)
    k_tiles = tl.cdiv(in_features, TILE_COLUMNS)
    units = tl.cdiv(in_features, UNIT)
    stride = n_tiles * TILE_ROWS
    start = tl.program_id(0) * SLICE
    first = tl.program_id(1) * tiles_a_program
    end = tl.minimum(first + tiles_a_program, n_tiles)

    # weights do not depend on the kernel before this one: they are on their way while it still runs
    next_words = _load_tiles(tiles, first, end, start // TILE_COLUMNS, k_tiles, CHUNKS, BITS)
    next_scales = _load_scales(scales, first, end, start // UNIT, units, stride, UNITS, UNITS_A_GROUP)
    if zeros is not None:
        next_zeros = _load_scales(zeros, first, end, start // UNIT, units, stride, UNITS, UNITS_A_GROUP)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    m = tl.arange(0, BLOCK_M)
    own = tl.arange(0, 1 if ONE_ROW else BLOCK_M)[:, None]
    column = start + tl.arange(0, SLICE)[None, :]
    kept = tl.load(x + own * x_stride + column, mask=(own < rows) & (column < in_features), other=0.0)
    if cos_sin is not None:
        table = cos_sin + start * LOG_BLOCK
        pairs = (in_features - start) // 2
        kept = butterfly(kept.to(tl.float32), table, pairs, LOG_BLOCK, 1 << LOG_BLOCK, 0, LOG_BLOCK, 1).to(dtype)
    if ONE_ROW:  # rotated alone; the matrix unit wants more
        kept = tl.where(m[:, None] == 0, kept, 0.0).to(dtype)
    kept = _split_columns(kept, LOG_UNITS)
    if zeros is not None:
        sums = ()
        for u in tl.static_range(UNITS):
            sums = sums + (tl.sum(kept[u].to(tl.float32), axis=1) / down_scale(dtype),)

    for row in range(first, end):
        words, scale = next_words, next_scales
        next_words = _load_tiles(tiles, row + 1, end, start // TILE_COLUMNS, k_tiles, CHUNKS, BITS)
        next_scales = _load_scales(scales, row + 1, end, start // UNIT, units, stride, UNITS, UNITS_A_GROUP)
        if zeros is not None:
            zero = next_zeros
            next_zeros = _load_scales(zeros, row + 1, end, start // UNIT, units, stride, UNITS, UNITS_A_GROUP)
        acc = tl.full([TILE_ROWS, BLOCK_M], 0.0, tl.float32)
        for chunk in tl.static_range(CHUNKS):
            split = split_words(words[chunk], 1, BITS)
            for part in tl.static_range(UNITS_A_CHUNK):
                levels = operands(split, part * PAIRS, PAIRS, BITS, dtype)
                product = tl.dot(levels, tl.trans(kept[chunk * UNITS_A_CHUNK + part]), input_precision="ieee")
                if zeros is not None:
                    centred = zero[chunk * UNITS_A_CHUNK + part].to(tl.float32) - centre(BITS)
                    product -= centred[:, None] * sums[chunk * UNITS_A_CHUNK + part][None, :]
                acc += product * scale[chunk * UNITS_A_CHUNK + part].to(tl.float32)[:, None]
        acc *= down_scale(dtype)
        n = row * TILE_ROWS + tl.arange(0, TILE_ROWS)
        if SLICES == 1:
            if bias is not None:
                acc += tl.load(bias + n, mask=n < out_features, other=0.0).to(tl.float32)[:, None]
            target = out + m[None, :] * out_features + n[:, None]
            tl.store(target, acc.to(out.dtype.element_ty), mask=(m < rows)[None, :] & (n < out_features)[:, None])
        else:
            target = partial + (tl.program_id(0) * rows + m)[None, :] * stride + n[:, None]
            tl.store(target, acc, mask=(m < rows)[None, :])

    if SLICES > 1:
        # The last program to finish adds up what all slices left, always in the same order. The barrier lets one
        # thread's release cover the stores of all.
        tl.debug_barrier()
        finished = tl.atomic_add(counters + tl.program_id(1), 1, sem="acq_rel")
        if finished == SLICES - 1:
            tl.store(counters + tl.program_id(1), 0)  # ready for the next launch
            part = tl.arange(0, SLICES_PADDED)[:, None]
            for r in range(rows):
                for left in range(first * TILE_ROWS, end * TILE_ROWS, REDUCE):
                    columns = left + tl.arange(0, REDUCE)
                    inside = columns < tl.minimum(end * TILE_ROWS, out_features)
                    left_there = partial + (part * rows + r) * stride + columns[None, :]
                    # past the first-level cache, which does not see what other programs wrote
                    values = tl.load(
                        left_there, mask=(part < SLICES) & inside[None, :], other=0.0, cache_modifier=".cg"
                    )
                    total = tl.sum(values, axis=0)
                    if bias is not None:
                        total += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
                    tl.store(out + r * out_features + columns, total.to(out.dtype.element_ty), mask=inside)


def columns_kept(wanted: int, group: int, float_zero: bool) -> int:
    """Columns that a program keeps, at most `wanted`: scales of the tile ahead have to fit into its registers."""
    units = 4 if float_zero else 8
    return max(min(wanted, units * unit_of(group)), COLUMNS)


def launch_config(rows: int, bits: int, group: int, in_features: int, block: int, slice_columns: int) -> dict:
    """Compile-time arguments and compiler options of the decode kernel.

    Args:
        rows: rows of x, 1 to 16.
        bits: bits per code.
        group: columns that share a scale, a multiple of 32.
        in_features: K.
        block: block size of the rotation to apply, a power of two that divides `slice_columns`; 1 for none.
        slice_columns: columns that a program keeps, 128·2ⁱ.
    """
    unit = unit_of(group)
    slices = triton.cdiv(in_features, slice_columns)
    padded = triton.next_power_of_2(slices)
    return {
        "BITS": bits,
        "UNIT": unit,
        "UNITS_A_GROUP": group // unit,
        "LOG_BLOCK": block.bit_length() - 1,
        "ONE_ROW": rows == 1,
        "BLOCK_M": 16,  # with less, Triton 3.6 leaves the wide matrix instructions of Hopper aside
        "SLICE": slice_columns,
        "LOG_UNITS": (slice_columns // unit).bit_length() - 1,
        "SLICES": slices,
        "SLICES_PADDED": padded,
        "REDUCE": max(4096 // padded, 64),  # 32 values a thread
        "num_warps": 4,  # 16 rows of a tile each
        "num_stages": 1,  # the kernel itself loads one tile ahead
    }
