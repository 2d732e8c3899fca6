"""The packed linear for few rows: a program keeps a slice of x, rotates it once, and streams weights past it.

Measured on an H100 with 2-bit weights 8192² in groups of 128, rotation of blocks of 128 included: 12.2 µs for one row,
where only reading the packed words takes 5.25. Latency holds the kernel back, not bandwidth or the instruction rate:
at 3 programs per multiprocessor a scheduler issues 0.46 instructions per cycle, and memory is busy 28 % of the time
(Nsight Compute). So the weights of the next tile, and those of the first one before x is there, are always under way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import tiles
from .tiles import unit_of
from .triton_norm import normalize
from .triton_rotate import butterfly
from .triton_unpack import (
    TILE_K,
    TILE_N,
    WORDS_PER_BIT,
    down_scale,
    load_words,
    midrise,
    operands,
    split_words,
)


@triton.jit
def _load_tiles(tiles_ptr, n_tile, n_end, k_tile, k_tiles, CHUNKS: tl.constexpr, BITS: tl.constexpr):
    """Words of CHUNKS tiles side by side; nothing is read from row `n_end` of tiles on."""
    words = ()
    for chunk in tl.static_range(CHUNKS):
        tile_ptr = tiles_ptr + (n_tile * k_tiles + k_tile + chunk).to(tl.int64) * (WORDS_PER_BIT * BITS)
        zero = tl.arange(0, 1)[:, None]  # makes tensors of the scalars, as the mask of a tensor must be
        mask = (k_tile + chunk + zero < k_tiles) & (n_tile + zero < n_end)
        words = words + (load_words(tile_ptr, mask, BITS, 1, 0),)
    return words


@triton.jit
def _load_scales(scales_ptr, n_tile, n_end, unit, units, stride_sg, UNITS: tl.constexpr, UNITS_PER_GROUP: tl.constexpr):
    """Scales of a tile's outputs for UNITS units of columns; from row `n_end` on those of the last row, unused."""
    offs_n = tl.minimum(n_tile, n_end - 1) * TILE_N + tl.arange(0, TILE_N)
    scales = ()
    for u in tl.static_range(UNITS):
        group = tl.minimum(unit + u, units - 1) // UNITS_PER_GROUP
        scales = scales + (tl.load(scales_ptr + group * stride_sg + offs_n),)
    return scales


@triton.jit
def _load_weights(
    tiles_ptr,
    scales_ptr,
    zeros_ptr,
    n_tile,
    n_end,
    start_k,
    K,
    stride_sg,
    SLICE: tl.constexpr,
    UNIT: tl.constexpr,
    UNITS_PER_GROUP: tl.constexpr,
    BITS: tl.constexpr,
):
    """Words, scales and zeros (empty without `zeros_ptr`) of row `n_tile` of tiles, columns from start_k on."""
    UNITS: tl.constexpr = SLICE // UNIT
    unit, units = start_k // UNIT, tl.cdiv(K, UNIT)
    words = _load_tiles(tiles_ptr, n_tile, n_end, start_k // TILE_K, tl.cdiv(K, TILE_K), SLICE // TILE_K, BITS)
    scales = _load_scales(scales_ptr, n_tile, n_end, unit, units, stride_sg, UNITS, UNITS_PER_GROUP)
    zeros = ()
    if zeros_ptr is not None:
        zeros = _load_scales(zeros_ptr, n_tile, n_end, unit, units, stride_sg, UNITS, UNITS_PER_GROUP)
    return words, scales, zeros


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
def _load_x_slice(
    x_ptr,
    norm,
    cos_sin_ptr,
    M,
    stride_xm,
    K,
    start_k,
    LOG_ROTATION_BLOCK: tl.constexpr,
    SINGLE_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLICE: tl.constexpr,
    LOG_UNITS: tl.constexpr,
):
    """Columns start_k … start_k + SLICE of x, rotated unless `cos_sin_ptr` is None, as one tensor per unit.

    norm: pointers to residual, γ and the sum to write, and ε; where that of γ is not None, the row is normalized first.
    """
    if norm[1] is not None:
        offs_k = start_k + tl.arange(0, SLICE)
        writes = tl.program_id(1) == 0  # of the programs that hold these columns
        x_slice = normalize(x_ptr, *norm, 0, offs_k, offs_k < K, K, writes)[None, :]
    else:
        offs_m = tl.arange(0, 1 if SINGLE_ROW else BLOCK_M)[:, None]
        offs_k = start_k + tl.arange(0, SLICE)[None, :]
        x_slice = tl.load(x_ptr + offs_m * stride_xm + offs_k, mask=(offs_m < M) & (offs_k < K), other=0.0)
    if cos_sin_ptr is not None:
        table_ptr = cos_sin_ptr + start_k * LOG_ROTATION_BLOCK
        rotated = butterfly(
            x_slice.to(tl.float32),
            table_ptr,
            (K - start_k) // 2,
            LOG_ROTATION_BLOCK,
            1 << LOG_ROTATION_BLOCK,
            0,
            LOG_ROTATION_BLOCK,
            1,
        )
        x_slice = rotated.to(x_ptr.dtype.element_ty)
    if SINGLE_ROW:  # rotated as one row; the matrix unit takes BLOCK_M
        x_slice = tl.where(tl.arange(0, BLOCK_M)[:, None] == 0, x_slice, 0.0).to(x_ptr.dtype.element_ty)
    return _split_columns(x_slice, LOG_UNITS)


@triton.jit
def _multiply_tiles(
    words,
    scales,
    zeros,
    x_slice,
    x_sums,
    BLOCK_M: tl.constexpr,
    CHUNKS: tl.constexpr,
    UNIT: tl.constexpr,
    BITS: tl.constexpr,
    FLOAT_ZEROS: tl.constexpr,
    dtype: tl.constexpr,
):
    """Product [64, BLOCK_M] of CHUNKS tiles side by side with the slice of x.

    Float zeros are subtracted after the product, times `x_sums`, the sum of every row of x over a unit.
    """
    UNITS_PER_CHUNK: tl.constexpr = TILE_K // UNIT
    PAIRS: tl.constexpr = UNIT // 8
    acc = tl.full([TILE_N, BLOCK_M], 0.0, tl.float32)
    for chunk in tl.static_range(CHUNKS):
        tile_words = split_words(words[chunk], 1, BITS)
        for u in tl.static_range(UNITS_PER_CHUNK):
            weight = operands(tile_words, u * PAIRS, PAIRS, BITS, dtype)
            product = tl.dot(weight, tl.trans(x_slice[chunk * UNITS_PER_CHUNK + u]), input_precision="ieee")
            if FLOAT_ZEROS:
                centred = zeros[chunk * UNITS_PER_CHUNK + u].to(tl.float32) - midrise(BITS)
                product -= centred[:, None] * x_sums[chunk * UNITS_PER_CHUNK + u][None, :]
            acc += product * scales[chunk * UNITS_PER_CHUNK + u].to(tl.float32)[:, None]
    return acc * down_scale(dtype)


@triton.jit
def _reduce_slices(
    counter_ptr,
    partial_ptr,
    bias_ptr,
    out_ptr,
    n_begin,
    n_end,
    M,
    N,
    stride_pm,
    SLICES: tl.constexpr,
    PADDED_SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """In the last program to finish: add up partial sums of outputs n_begin … n_end, in the same order, and store them.

    Programs of the same outputs share the counter. The barrier lets one thread's release cover the stores of all.
    """
    tl.debug_barrier()
    if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == SLICES - 1:
        tl.store(counter_ptr, 0)  # ready for the next launch
        offs_slice = tl.arange(0, PADDED_SLICES)[:, None]
        for m in range(M):
            for start_n in range(n_begin, n_end, BLOCK_N):
                offs_n = start_n + tl.arange(0, BLOCK_N)
                mask_n = offs_n < tl.minimum(n_end, N)
                partial_ptrs = partial_ptr + (offs_slice * M + m) * stride_pm + offs_n[None, :]
                mask = (offs_slice < SLICES) & mask_n[None, :]
                # .cg: past the first-level cache, which does not see what other programs wrote
                total = tl.sum(tl.load(partial_ptrs, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
                if bias_ptr is not None:
                    total += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
                tl.store(out_ptr + m * N + offs_n, total.to(out_ptr.dtype.element_ty), mask=mask_n)


@triton.jit
def _decode_kernel(
    x_ptr,
    cos_sin_ptr,  # None: x is already rotated
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
    tiles_per_program,
    residual_ptr,  # or None
    norm_weight_ptr,  # None: x is not normalized; else M is 1, and the program rotates it
    total_ptr,
    epsilon,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,  # columns per tl.dot; they share a scale
    UNITS_PER_GROUP: tl.constexpr,
    LOG_ROTATION_BLOCK: tl.constexpr,
    SINGLE_ROW: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLICE: tl.constexpr,  # columns that a program keeps
    LOG_UNITS: tl.constexpr,  # units per slice
    SLICES: tl.constexpr,
    PADDED_SLICES: tl.constexpr,
    REDUCE_N: tl.constexpr,  # outputs that are reduced together
    PDL: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    FLOAT_ZEROS: tl.constexpr = zeros_ptr is not None
    pid_k, pid_n = tl.program_id(0), tl.program_id(1)
    n_tiles = tl.cdiv(N, TILE_N)
    stride_sg = n_tiles * TILE_N  # of scales and zeros, from group to group
    start_k = pid_k * SLICE
    n_begin = pid_n * tiles_per_program
    n_end = tl.minimum(n_begin + tiles_per_program, n_tiles)

    # weights do not depend on the previous kernel: they are loaded while it still runs
    pointers = tiles_ptr, scales_ptr, zeros_ptr
    next_weights = _load_weights(*pointers, n_begin, n_end, start_k, K, stride_sg, SLICE, UNIT, UNITS_PER_GROUP, BITS)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    norm = residual_ptr, norm_weight_ptr, total_ptr, epsilon
    x_slice = _load_x_slice(
        x_ptr, norm, cos_sin_ptr, M, stride_xm, K, start_k, LOG_ROTATION_BLOCK, SINGLE_ROW, BLOCK_M, SLICE, LOG_UNITS
    )
    x_sums = ()
    if FLOAT_ZEROS:
        for u in tl.static_range(SLICE // UNIT):
            x_sums = x_sums + (tl.sum(x_slice[u].to(tl.float32), axis=1) / down_scale(dtype),)

    offs_m = tl.arange(0, BLOCK_M)
    for n_tile in range(n_begin, n_end):
        words, scales, zeros = next_weights
        next_weights = _load_weights(
            *pointers, n_tile + 1, n_end, start_k, K, stride_sg, SLICE, UNIT, UNITS_PER_GROUP, BITS
        )
        acc = _multiply_tiles(
            words, scales, zeros, x_slice, x_sums, BLOCK_M, SLICE // TILE_K, UNIT, BITS, FLOAT_ZEROS, dtype
        )
        offs_n = n_tile * TILE_N + tl.arange(0, TILE_N)
        if SLICES == 1:
            mask_n = offs_n < N
            if bias_ptr is not None:
                acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[:, None]
            out_ptrs = out_ptr + offs_m[None, :] * N + offs_n[:, None]
            tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m < M)[None, :] & mask_n[:, None])
        else:
            partial_ptrs = partial_ptr + (pid_k * M + offs_m)[None, :] * stride_sg + offs_n[:, None]
            tl.store(partial_ptrs, acc, mask=(offs_m < M)[None, :])

    if SLICES > 1:
        sums = partial_ptr, bias_ptr, out_ptr, n_begin * TILE_N, n_end * TILE_N, M, N, stride_sg
        _reduce_slices(counters_ptr + pid_n, *sums, SLICES, PADDED_SLICES, REDUCE_N)


THREADS = 128
MAX_WORDS = 48  # of a tile slice per thread: two tiles are held, and 2 × 64 spill on sm90 (4 bits, 1,024 columns)


def kept_columns(wanted: int, bits: int, group_size: int, float_zero: bool) -> int:
    """Columns that a program keeps, at most `wanted`: its registers hold words and scales of the tile ahead as well.

    Args:
        wanted: columns that the launch asks for, 128·2ⁱ.
        bits: bits per code.
        group_size: columns that share a scale.
        float_zero: whether zeros come with the scales.
    """
    scales_fit = (4 if float_zero else 8) * unit_of(group_size)
    words_fit = MAX_WORDS * 32 * THREADS // (tiles.TILE_N * bits)
    most = min(wanted, scales_fit, words_fit)
    return max(1 << (most.bit_length() - 1), tiles.TILE_K)


def launch_config(
    rows: int, bits: int, group_size: int, in_features: int, rotation_block: int, slice_columns: int
) -> dict[str, int]:
    """Compile-time arguments and compiler options of the decode kernel.

    Args:
        rows: rows of x, 1 to 16.
        bits: bits per code.
        group_size: columns that share a scale, a multiple of 32.
        in_features: K.
        rotation_block: block size of the rotation to apply, a power of two that divides `slice_columns`; 1 for none.
        slice_columns: columns that a program keeps, 128·2ⁱ.
    """
    unit = unit_of(group_size)
    slices = triton.cdiv(in_features, slice_columns)
    padded_slices = triton.next_power_of_2(slices)
    return {
        "BITS": bits,
        "UNIT": unit,
        "UNITS_PER_GROUP": group_size // unit,
        "LOG_ROTATION_BLOCK": rotation_block.bit_length() - 1,
        "SINGLE_ROW": rows == 1,
        "BLOCK_M": 16,  # with less, Triton 3.6 does not use Hopper's warpgroup instructions
        "SLICE": slice_columns,
        "LOG_UNITS": (slice_columns // unit).bit_length() - 1,
        "SLICES": slices,
        "PADDED_SLICES": padded_slices,
        "REDUCE_N": max(4096 // padded_slices, 64),  # 32 values per thread
        "num_warps": THREADS // 32,  # 16 outputs of a tile each
        "num_stages": 1,  # the kernel itself loads one tile ahead
    }
