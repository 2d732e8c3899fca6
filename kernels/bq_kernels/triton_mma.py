"""The packed linear for few rows on mma.sync: a program owns 16, 32 or 64 outputs and all columns.

Its warps share the columns, tile after tile in turn, and add up once, at the end: no sums pass through global memory.
Weights go through a ring in shared memory that is private to a warp: copies of the next tiles are under way while one
is multiplied, the first of them before the kernel that arranges x has ended. The loop has no barrier but that of a
warp. Codes reach the matrix unit as they lie in their words (operands.py).

Not measured yet. Bytes in flight and instructions per word are asserted on the machine code (tests/kernels).
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import ptx
from .gpu import Gpu
from .operands import EXACT_EXPONENT, EXPONENT, PAIRS, ROWS_PER_MMA
from .tiles import TILE_K as _TILE_K
from .tiles import TILE_N, WORDS_PER_BIT, unit_of
from .triton_unpack import TILE_K

STRIPS_PER_TILE = TILE_N // 16
TILE_BYTES_PER_BIT = tl.constexpr(4 * WORDS_PER_BIT)
TILE_STRIPS = tl.constexpr(STRIPS_PER_TILE)
X_VECTORS = tl.constexpr(PAIRS // 4)  # 16-byte loads of a lane's columns of x
BACK, EXACT_BACK = tl.constexpr(2.0**EXPONENT), tl.constexpr(2.0**EXACT_EXPONENT)
# of shared memory that a program has without opting in, which Triton does for its own share alone: sums take some of it
SHARED_LIMIT, SUM_BYTES = 48 * 1024, 32 * 4 * 4


@triton.constexpr_function
def _types(number, dtype):
    return (dtype,) * number


@triton.jit
def _load_vectors(address, VECTORS: tl.constexpr, APART: tl.constexpr, KIND: tl.constexpr):
    """4·VECTORS registers per thread; not pure, for it must stay behind the wait for the kernel before."""
    text: tl.constexpr = ptx.load_text(VECTORS, APART)
    constraints: tl.constexpr = ptx.load_constraints(VECTORS, KIND)
    types: tl.constexpr = _types(4 * VECTORS, tl.float32 if KIND == "f" else tl.int32)
    return tl.inline_asm_elementwise(text, constraints, [address], dtype=types, is_pure=False, pack=1)


@triton.jit
def _shared_memory(thread, SIZE: tl.constexpr):
    """Address of SIZE bytes of shared memory."""
    text: tl.constexpr = ptx.shared_text(SIZE)
    return tl.inline_asm_elementwise(text, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _arrive(thread, PENDING: tl.constexpr):
    text: tl.constexpr = ptx.arrive_text(PENDING)
    tl.inline_asm_elementwise(text, "=r,r", [thread], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _request(
    tiles_ptr,
    scales_ptr,
    zeros_ptr,
    stage,  # shared address
    first_strip,
    k_tile,  # [threads]
    k_tiles,
    units,
    stride_sg,
    on,
    lane,
    BITS: tl.constexpr,
    STRIPS: tl.constexpr,
    UNITS: tl.constexpr,
    UNITS_PER_GROUP: tl.constexpr,
):
    """Ask for words, scales and zeros of one tile, where `on`."""
    WORD_BYTES: tl.constexpr = STRIPS * 256 * BITS
    SCALE_BYTES: tl.constexpr = STRIPS * 32 * UNITS
    TILE_BYTES: tl.constexpr = TILE_BYTES_PER_BIT * BITS
    strip = first_strip % TILE_STRIPS
    tile = tiles_ptr.to(tl.int64) + (first_strip // TILE_STRIPS * k_tiles + k_tile).to(tl.int64) * TILE_BYTES
    part = lane % (2 * STRIPS)  # eight scales
    group = tl.minimum(k_tile * UNITS + lane // (2 * STRIPS), units - 1) // UNITS_PER_GROUP
    offset = (group * stride_sg + first_strip * 16 + part * 8).to(tl.int64) * 2
    on = (k_tile * 0 + on).to(tl.int32)
    arguments = (stage + lane * 16, tile + (strip * 512 + lane * 16), on)
    copies_scales = (lane < 2 * STRIPS * UNITS).to(tl.int32) * on
    arguments = arguments + (stage + (WORD_BYTES + lane * 16), scales_ptr.to(tl.int64) + offset, copies_scales)
    if zeros_ptr is not None:
        arguments = arguments + (zeros_ptr.to(tl.int64) + offset,)
    if BITS == 3:
        arguments = arguments + (stage + (STRIPS * 512 + lane * 8), tile + (2048 + strip * 256 + lane * 8))
    text: tl.constexpr = ptx.request_text(BITS, STRIPS, zeros_ptr is not None, SCALE_BYTES)
    constraints: tl.constexpr = ptx.request_constraints(BITS, zeros_ptr is not None)
    tl.inline_asm_elementwise(text, constraints, arguments, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _multiply(
    stage,
    x,
    factors,
    acc,
    lane,
    BITS: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNITS: tl.constexpr,
    EXACT: tl.constexpr,
    FLOAT_ZEROS: tl.constexpr,
):
    """`acc` and the products of the tile in a stage, as one tuple of [threads]."""
    addresses = (stage + lane * 16, stage + (STRIPS * 256 * BITS + lane // 4 * 2), stage + (STRIPS * 512 + lane * 8))
    text: tl.constexpr = ptx.multiply_text(BITS, STRIPS, BLOCKS, UNITS, EXACT, FLOAT_ZEROS, STRIPS * 32 * UNITS)
    constraints: tl.constexpr = ptx.multiply_constraints(STRIPS, BLOCKS, UNITS)
    types: tl.constexpr = _types(4 * BLOCKS * STRIPS, tl.float32)
    arguments = addresses + x + factors + acc
    return tl.inline_asm_elementwise(text, constraints, arguments, dtype=types, is_pure=False, pack=1)


@triton.jit
def _load_x(x_ptr, sums_ptr, k_tile, k_tiles, M, lane, valid, BLOCKS: tl.constexpr, UNITS: tl.constexpr):
    """A lane's columns of x, and the factors of its rows of the product, times 0 where not `valid`."""
    x = ()
    for n in tl.static_range(BLOCKS):
        row = tl.minimum(lane // 4 + 8 * n, M - 1)
        offset = ((row * k_tiles + k_tile) * TILE_K + lane % 4 * 32).to(tl.int64) * 2
        x = x + _load_vectors(x_ptr.to(tl.int64) + offset, X_VECTORS, 16, "r")
    offset = (k_tile * (UNITS * BLOCKS * 64) + lane % 4 * 16).to(tl.int64)
    loaded = _load_vectors(sums_ptr.to(tl.int64) + offset, UNITS * BLOCKS, 64, "f")
    factors = ()
    for i in tl.static_range(2 * UNITS * BLOCKS):
        factors = factors + (loaded[2 * i], tl.where(valid, loaded[2 * i + 1], 0.0))
    return x, factors


@triton.jit
def _sum_of_warps(acc, FIRST: tl.constexpr, WARPS: tl.constexpr):
    """Sums over all warps of four accumulators from the FIRST on, [32, 4]; one strip at a time takes little memory."""
    even, odd = tl.join(acc[FIRST], acc[FIRST + 2]), tl.join(acc[FIRST + 1], acc[FIRST + 3])
    return tl.sum(tl.reshape(tl.join(even, odd), [WARPS, 32, 4]), axis=0)


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
    STAGES: tl.constexpr,  # tiles of a warp in shared memory
    STAGE_BYTES: tl.constexpr,
    EXACT: tl.constexpr,
    PDL: tl.constexpr,
):
    thread = tl.arange(0, 32 * WARPS)
    lane, warp = thread % 32, thread // 32
    first_strip = tl.program_id(0) * STRIPS
    ring = _shared_memory(thread, WARPS * STAGES * STAGE_BYTES) + warp * (STAGES * STAGE_BYTES)
    weights = tiles_ptr, scales_ptr, zeros_ptr

    # weights do not depend on the previous kernel: they are on their way while it still runs
    for stage in tl.static_range(STAGES - 1):
        k_tile = tl.minimum(warp + stage * WARPS, k_tiles - 1)
        _request(
            *weights, ring + stage * STAGE_BYTES, first_strip, k_tile, k_tiles, units, stride_sg, stage < STEPS, lane,
            BITS, STRIPS, UNITS, UNITS_PER_GROUP,
        )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    acc = ()
    for _ in tl.static_range(4 * STRIPS * BLOCKS):
        acc = acc + (tl.full([32 * WARPS], 0.0, tl.float32),)
    for step in range(STEPS):
        # a warp without a tile left multiplies the last one again, by 0
        k_tile = warp + step * WARPS
        x, factors = _load_x(
            x_ptr, sums_ptr, tl.minimum(k_tile, k_tiles - 1), k_tiles, M, lane, k_tile < k_tiles, BLOCKS, UNITS
        )
        _arrive(thread, STAGES - 2)
        ahead = step + STAGES - 1  # goes where the tile of the step before was: all lanes have read that
        k_ahead = tl.minimum(warp + ahead * WARPS, k_tiles - 1)
        _request(
            *weights, ring + ahead % STAGES * STAGE_BYTES, first_strip, k_ahead, k_tiles, units, stride_sg,
            ahead < STEPS, lane, BITS, STRIPS, UNITS, UNITS_PER_GROUP,
        )  # fmt: skip
        current = ring + step % STAGES * STAGE_BYTES
        acc = _multiply(current, x, factors, acc, lane, BITS, STRIPS, BLOCKS, UNITS, EXACT, zeros_ptr is not None)

    # sums of lane (g, t) are those of outputs 8·half + g of a strip and rows 2t + side of a block of x
    offs_lane, offs_sum = tl.arange(0, 32)[:, None], tl.arange(0, 4)[None, :]
    for n in tl.static_range(BLOCKS):
        for c in tl.static_range(STRIPS):
            total = _sum_of_warps(acc, 4 * (n * STRIPS + c), WARPS) * (EXACT_BACK if EXACT else BACK)
            offs_n = (first_strip + c) * 16 + offs_sum // 2 * 8 + offs_lane // 4
            offs_m = 8 * n + offs_lane % 4 * 2 + offs_sum % 2
            if bias_ptr is not None:
                total += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
            mask = (offs_m < M) & (offs_n < N)
            tl.store(out_ptr + offs_m * N + offs_n, total.to(out_ptr.dtype.element_ty), mask=mask)


def runs_on(gpu: Gpu) -> bool:
    """Whether a GPU has the kernel's instructions: NVIDIA's from sm_80 on, and neither AMD's nor the interpreter."""
    return gpu.architecture.startswith("sm") and int(gpu.architecture[2:]) >= 80


def launch_config(
    rows: int,
    bits: int,
    group_size: int,
    in_features: int,
    float_zeros: bool,
    outputs: int,
    warps: int,
    stages: int,
    exact: bool,
) -> dict[str, int]:
    """Compile-time arguments and compiler options of the kernel.

    Args:
        rows: rows of x, 1 to 16.
        bits: bits per code.
        group_size: columns that share a scale, a multiple of 32.
        in_features: K.
        float_zeros: whether zeros come with the scales.
        outputs: most outputs of a program, 16, 32 or 64; fewer where two stages of them do not fit shared memory.
        warps: that share the columns, a power of two up to 16.
        stages: most tiles of a warp in shared memory, at least 2.
        exact: whether codes are centred before the product (operands.py).
    """
    units = _TILE_K // unit_of(group_size)
    strip_bytes = 256 * bits + 32 * units * (2 if float_zeros else 1)
    strips, warp_bytes = outputs // 16, SHARED_LIMIT // warps - SUM_BYTES
    while strips > 1 and 2 * strips * strip_bytes > warp_bytes:
        strips //= 2
    return {
        "BITS": bits,
        "UNITS": units,
        "UNITS_PER_GROUP": group_size // unit_of(group_size),
        "STRIPS": strips,
        "BLOCKS": triton.cdiv(rows, ROWS_PER_MMA),
        "WARPS": warps,
        "STEPS": triton.cdiv(triton.cdiv(in_features, _TILE_K), warps),
        "STAGES": min(stages, warp_bytes // (strips * strip_bytes)),
        "STAGE_BYTES": strips * strip_bytes,
        "EXACT": exact,
        "num_warps": warps,
        "num_stages": 1,  # the kernel itself asks for tiles ahead
    }
