"""The packed linear for few rows on mma.sync: a program owns one to four strips of 16 outputs and all columns.

Its warps share the columns, tile after tile in turn, and add up once, at the end: no sums pass through global memory.
Words, scales and x go from memory straight into registers, words and x by 16-byte loads into those that the matrix unit
reads, a tile or two ahead of their use; the first weights are under way before the kernel that arranges x has ended. In
the loop nothing passes through shared memory and warps do not wait for each other. Codes reach the matrix unit as they
lie in their words (operands.py).

The design is that of a study which an H100 has timed (2 bits, groups of 128, float16, rotation in blocks of 128
included): its best shapes took 8.8, 9.3 and 12.2 µs for 8192² at 1, 8 and 16 rows, 7.0, 7.5 and 10.2 for 12288 × 4096.
This kernel's predecessor passed weights through a ring in shared memory and took 10.2, 12.7 and 18.3 as the geometric
mean of both layers, least with the fewest tiles in the ring. This kernel has not been timed yet. Its instructions, and
which bytes are in flight when, are asserted on the machine code (tests/kernels).
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import ptx
from .gpu import Gpu
from .operands import EXACT_EXPONENT, EXPONENT, PAIRS, ROWS_PER_MMA
from .tiles import TILE_K as _TILE_K
from .tiles import unit_of
from .triton_mma_loads import (
    TILE_BYTES_PER_BIT,
    TILE_STRIPS,
    X_BYTES,
    advance,
    load,
    load_weights,
    load_x,
    only_where,
    run_addresses,
    tiles_to,
    types_of,
)

BACK, EXACT_BACK = tl.constexpr(2.0**EXPONENT), tl.constexpr(2.0**EXACT_EXPONENT)
REGISTERS = 65536  # of a multiprocessor
MOST_KEPT, SPARE = 128, 32  # of a thread: what the loop may keep, and what it needs beside that; else ptxas spills


@triton.jit
def _shared_memory(thread, SIZE: tl.constexpr):
    """Address of SIZE bytes of shared memory."""
    text: tl.constexpr = ptx.shared_text(SIZE)
    return tl.inline_asm_elementwise(text, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _clear(address):
    """Store the 0 that `_multiply` reads."""
    text: tl.constexpr = ptx.clear_text()
    tl.inline_asm_elementwise(text, "=r,r", [address], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _multiply(
    weights,
    x,
    factors,  # address
    acc,
    zero,  # shared address of a 0, where FENCED
    BITS: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNITS: tl.constexpr,
    EXACT: tl.constexpr,
    FLOAT_ZEROS: tl.constexpr,
    FENCED: tl.constexpr,
):
    """`acc` and the products of a tile, a tuple of [threads]; `weights` and `x` as they were loaded."""
    text: tl.constexpr = ptx.multiply_text(BITS, STRIPS, BLOCKS, UNITS, EXACT, FLOAT_ZEROS, FENCED)
    constraints: tl.constexpr = ptx.multiply_constraints(BITS, STRIPS, BLOCKS, UNITS, FLOAT_ZEROS, FENCED)
    types: tl.constexpr = types_of(4 * BLOCKS * STRIPS, tl.float32)
    # factors are needed behind the products: they arrive meanwhile
    arguments = weights + x + load(factors, 4, UNITS * BLOCKS, 64, "f", False) + acc
    if FENCED:
        arguments = arguments + (zero,)
    return tl.inline_asm_elementwise(text, constraints, arguments, dtype=types, is_pure=False, pack=1)


@triton.jit
def _sum_of_warps(acc, shared, thread, STRIPS: tl.constexpr, WARPS: tl.constexpr, EACH: tl.constexpr):
    """Sums of 4·STRIPS accumulators over all warps, EACH per thread (ptx.sum_text)."""
    addresses = (shared + thread * 16,)
    for o in tl.static_range(EACH):
        number = (thread + o * (32 * WARPS)) % (128 * STRIPS)
        addresses += (shared + number // 128 * (512 * WARPS) + number % 128 * 4,)
    text: tl.constexpr = ptx.sum_text(STRIPS, WARPS, EACH)
    constraints: tl.constexpr = ptx.sum_constraints(STRIPS, EACH)
    types: tl.constexpr = types_of(EACH, tl.float32)
    return tl.inline_asm_elementwise(text, constraints, addresses + acc, dtype=types, is_pure=False, pack=1)


@triton.jit
def _last_steps(
    acc, words, thirds, rows, factors, weights, x, scales, zero, warp, last, FLOAT_ZEROS: tl.constexpr,
    BITS: tl.constexpr, UNITS: tl.constexpr, UNITS_PER_GROUP: tl.constexpr, STRIPS: tl.constexpr, RUN: tl.constexpr,
    BLOCKS: tl.constexpr, WARPS: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr, LOOPED: tl.constexpr,
    STAGES: tl.constexpr, X_STAGES: tl.constexpr, EXACT: tl.constexpr, FACTOR_BYTES: tl.constexpr,
):  # fmt: skip
    """`acc` and the products of the steps behind the loop, some of which have nothing left to ask for."""
    for step in tl.static_range(LOOPED, STEPS):
        current, tiles = weights[0], tiles_to(step, last, WARPS, STEPS, EVEN)
        if step == STEPS - 1 and not EVEN:  # a warp without a tile left multiplies the last one again, by 0
            current = only_where(tiles == step * WARPS, current, ptx.packets(STRIPS, UNITS))
        acc = _multiply(
            current, x[0], factors + (tiles - LOOPED * WARPS) * FACTOR_BYTES, acc, zero,
            BITS, STRIPS, BLOCKS, UNITS, EXACT, FLOAT_ZEROS, STAGES > 1,
        )  # fmt: skip
        weights, x = weights[1:], x[1:]
        if step + STAGES < STEPS:
            tiles = tiles_to(step + STAGES, last, WARPS, STEPS, EVEN)
            ahead = load_weights(
                words, thirds, tiles - LOOPED * WARPS, warp + tiles, *scales,
                BITS, STRIPS, RUN, UNITS, UNITS_PER_GROUP,
            )  # fmt: skip
            weights += (ahead,)
        if step + X_STAGES < STEPS:
            x += (load_x(rows, tiles_to(step + X_STAGES, last, WARPS, STEPS, EVEN) - LOOPED * WARPS, BLOCKS),)
    return acc


@triton.jit
def _store_sums(
    acc, shared, thread, first_strip, bias_ptr, out_ptr, M, N,
    STRIPS: tl.constexpr, BLOCKS: tl.constexpr, WARPS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Add up over warps and store: lane (g, t) has outputs 8·half + g of a strip and rows 2t + side of a block of x."""
    EACH: tl.constexpr = (4 * STRIPS + WARPS - 1) // WARPS  # sums of a thread and block of rows
    for n in tl.static_range(BLOCKS):
        if n > 0:
            tl.debug_barrier()  # all have read the sums of the block before
        sums = _sum_of_warps(acc[4 * STRIPS * n : 4 * STRIPS * (n + 1)], shared, thread, STRIPS, WARPS, EACH)
        for o in tl.static_range(EACH):
            number = thread + o * (32 * WARPS)
            offs_n = (first_strip + number // 128) * 16 + number // 2 % 2 * 8 + number // 16 % 8
            offs_m = 8 * n + number // 4 % 4 * 2 + number % 2
            mask = (number < 128 * STRIPS) & (offs_m < M) & (offs_n < N)
            total = sums[o] * (EXACT_BACK if EXACT else BACK)
            if bias_ptr is not None:
                total += tl.load(bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
            tl.store(out_ptr + offs_m * N + offs_n, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _mma_kernel(
    x_ptr,  # float16 [M, 128·k_tiles], arranged
    sums_ptr,  # float32 [units, 8·BLOCKS, 2]
    tiles_ptr,
    scales_ptr,
    zeros_ptr,  # None: mid-rise levels
    bias_ptr,  # or None
    out_ptr,
    M,
    N,
    k_tiles,
    units,  # of K columns
    stride_sg,  # of scales and zeros, from group to group
    BITS: tl.constexpr,
    UNITS: tl.constexpr,  # per tile
    UNITS_PER_GROUP: tl.constexpr,
    STRIPS: tl.constexpr,  # of 16 outputs per program
    BLOCKS: tl.constexpr,  # of 8 rows of x
    WARPS: tl.constexpr,
    STEPS: tl.constexpr,  # ⌈k_tiles / WARPS⌉
    EVEN: tl.constexpr,  # whether all warps have as many tiles
    STAGES: tl.constexpr,  # tiles of weights in flight per warp
    X_STAGES: tl.constexpr,  # tiles of x
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
):
    RUN: tl.constexpr = STRIPS if TILE_STRIPS % STRIPS == 0 else 1  # strips that lie in one tile
    TILE_BYTES: tl.constexpr = TILE_BYTES_PER_BIT * BITS
    FACTOR_BYTES: tl.constexpr = UNITS * BLOCKS * 64  # of a tile
    # the loop's steps: they ask for tiles that every warp has
    LOOPED: tl.constexpr = max(STEPS - STAGES - (not EVEN), 0) // STAGES * STAGES
    thread = tl.arange(0, 32 * WARPS)
    lane, warp = thread % 32, thread // 32
    first_strip, last_strip = tl.program_id(0) * STRIPS, (N + 15) // 16 - 1
    shared = _shared_memory(thread, 512 * WARPS * STRIPS + 4 * WARPS)
    zero = shared + 512 * WARPS * STRIPS + warp * 4
    if STAGES > 1:
        _clear(zero)

    # weights do not depend on the previous kernel: they are on their way while it still runs
    strips = tiles_ptr, first_strip, last_strip, k_tiles * TILE_BYTES
    words, thirds = run_addresses(*strips, warp * TILE_BYTES + lane * 16, 512, STRIPS, RUN), ()
    if BITS == 3:
        thirds = run_addresses(*strips, warp * TILE_BYTES + 2048 + lane * 8, 256, STRIPS, RUN)
    scales = scales_ptr, zeros_ptr, units, stride_sg, first_strip, last_strip, lane
    last, weights, rows, x, acc = k_tiles - 1 - warp, (), (), (), ()
    for step in tl.static_range(STAGES):
        tiles = tiles_to(step, last, WARPS, STEPS, EVEN)
        ahead = load_weights(words, thirds, tiles, warp + tiles, *scales, BITS, STRIPS, RUN, UNITS, UNITS_PER_GROUP)
        weights += (ahead,)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for n in tl.static_range(BLOCKS):
        row = tl.minimum(lane // 4 + 8 * n, M - 1).to(tl.int64)
        rows += (x_ptr.to(tl.int64) + (row * k_tiles + warp) * X_BYTES + lane % 4 * 16,)
    factors = sums_ptr.to(tl.int64) + warp * FACTOR_BYTES + lane % 4 * 16
    for step in tl.static_range(X_STAGES):
        x += (load_x(rows, tiles_to(step, last, WARPS, STEPS, EVEN), BLOCKS),)
    for _ in tl.static_range(4 * STRIPS * BLOCKS):
        acc += (tl.full([32 * WARPS], 0.0, tl.float32),)
    for first in range(0, LOOPED, STAGES):
        for stage in tl.static_range(STAGES):
            acc = _multiply(
                weights[0], x[0], factors + stage * WARPS * FACTOR_BYTES, acc, zero,
                BITS, STRIPS, BLOCKS, UNITS, EXACT, zeros_ptr is not None, STAGES > 1,
            )  # fmt: skip
            k_tile, on = warp + (first + stage + STAGES) * WARPS, (stage + STAGES) * WARPS
            ahead = load_weights(words, thirds, on, k_tile, *scales, BITS, STRIPS, RUN, UNITS, UNITS_PER_GROUP)
            weights, x = weights[1:] + (ahead,), x[1:] + (load_x(rows, (stage + X_STAGES) * WARPS, BLOCKS),)
        words = advance(words, STAGES * WARPS * TILE_BYTES)
        thirds = advance(thirds, STAGES * WARPS * TILE_BYTES)
        rows = advance(rows, STAGES * WARPS * X_BYTES)
        factors += STAGES * WARPS * FACTOR_BYTES
    acc = _last_steps(
        acc, words, thirds, rows, factors, weights, x, scales, zero, warp, last, zeros_ptr is not None,
        BITS, UNITS, UNITS_PER_GROUP, STRIPS, RUN, BLOCKS, WARPS, STEPS, EVEN, LOOPED, STAGES, X_STAGES, EXACT,
        FACTOR_BYTES,
    )  # fmt: skip
    _store_sums(acc, shared, thread, first_strip, bias_ptr, out_ptr, M, N, STRIPS, BLOCKS, WARPS, EXACT)


def runs_on(gpu: Gpu) -> bool:
    """Whether a GPU has the kernel's instructions: NVIDIA's from sm_80 on, and neither AMD's nor the interpreter."""
    return gpu.architecture.startswith("sm") and int(gpu.architecture[2:]) >= 80


def _kept(bits: int, units: int, strips: int, blocks: int, stages: int, float_zeros: bool) -> int:
    """Registers of a thread that hold sums, weights, x and factors in the loop."""
    weights = 2 * bits * strips + ptx.packets(strips, units) * (2 if float_zeros else 1)
    sums = 4 * blocks * (strips + min(strips, 2))
    return sums + weights * stages + PAIRS * blocks * max(stages // blocks, 1) + 4 * units * blocks


def launch_config(
    rows: int,
    bits: int,
    group_size: int,
    in_features: int,
    float_zeros: bool,
    outputs: int,
    warps: int,
    stages: int,
    programs: int,
    exact: bool,
) -> dict[str, int]:
    """Compile-time arguments and compiler options of the kernel.

    Args:
        rows: rows of x, 1 to 16.
        bits: bits per code.
        group_size: columns that share a scale, a multiple of 32.
        in_features: K.
        float_zeros: whether zeros come with the scales.
        outputs: most outputs of a program, 16, 32, 48 or 64; fewer where registers would not hold the loop.
        warps: that share the columns, a power of two up to 16.
        stages: tiles of weights in flight per warp, 1 or 2. As many of x; with more than 8 rows half as many.
        programs: that a multiprocessor's registers should have room for, where that spills none of them.
        exact: whether codes are centred before the product (operands.py).
    """
    units, blocks = _TILE_K // unit_of(group_size), triton.cdiv(rows, ROWS_PER_MMA)
    k_tiles, strips = triton.cdiv(in_features, _TILE_K), outputs // 16
    steps = triton.cdiv(k_tiles, warps)
    stages = min(stages, steps)

    def registers(programs):
        return REGISTERS // (32 * warps * programs) // 8 * 8

    def kept():
        return _kept(bits, units, strips, blocks, stages, float_zeros)

    while strips > 1 and kept() > min(MOST_KEPT, registers(1) - SPARE):
        strips //= 2
    config = {
        "BITS": bits,
        "UNITS": units,
        "UNITS_PER_GROUP": group_size // unit_of(group_size),
        "STRIPS": strips,
        "BLOCKS": blocks,
        "WARPS": warps,
        "STEPS": steps,
        "EVEN": k_tiles % warps == 0,
        "STAGES": stages,
        "X_STAGES": max(stages // blocks, 1),
        "EXACT": exact,
        "num_warps": warps,
        "num_stages": 1,  # the kernel itself asks for tiles ahead
    }
    # centred codes take more; with several units per tile ptxas spills under a limit that it keeps by itself
    if programs > 1 and units == 1 and not exact and kept() <= registers(programs) - SPARE:
        config["maxnreg"] = registers(programs)
    return config
