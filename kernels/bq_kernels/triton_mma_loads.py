"""What a lane of the decode kernel on mma.sync loads into its registers, and from where: words, scales, zeros and x."""

from __future__ import annotations

import triton
import triton.language as tl

from . import ptx
from .operands import PAIRS
from .tiles import TILE_K as _TILE_K
from .tiles import TILE_N, WORDS_PER_BIT

TILE_STRIPS, TILE_BYTES_PER_BIT = tl.constexpr(TILE_N // 16), tl.constexpr(4 * WORDS_PER_BIT)
X_BYTES = tl.constexpr(2 * _TILE_K)  # of a row and tile
X_VECTORS = tl.constexpr(PAIRS // 4)  # 16-byte loads of a lane's columns of x


@triton.constexpr_function
def types_of(number, dtype):
    """The types of so many results of inline PTX."""
    return (dtype,) * number


@triton.jit
def load(
    address, WIDTH: tl.constexpr, VECTORS: tl.constexpr, APART: tl.constexpr, KIND: tl.constexpr, ONCE: tl.constexpr
):
    """WIDTH·VECTORS registers per thread; not pure, for it must stay behind the wait for the kernel before."""
    text: tl.constexpr = ptx.load_text(WIDTH, VECTORS, APART, ONCE)
    constraints: tl.constexpr = ptx.load_constraints(WIDTH, VECTORS, KIND)
    types: tl.constexpr = types_of(WIDTH * VECTORS, tl.float32 if KIND == "f" else tl.int32)
    return tl.inline_asm_elementwise(text, constraints, [address], dtype=types, is_pure=False, pack=1)


@triton.jit
def run_addresses(
    ptr,
    first_strip,
    last_strip,
    row_bytes,
    lane_offset,
    STRIP_BYTES: tl.constexpr,
    STRIPS: tl.constexpr,
    RUN: tl.constexpr,
):
    """Where a lane finds the words of every run of strips in the first tile of its row."""
    addresses = ()
    for run in tl.static_range(STRIPS // RUN):
        strip = tl.minimum(first_strip + run * RUN, last_strip)
        row = ptr.to(tl.int64) + (strip // TILE_STRIPS).to(tl.int64) * row_bytes
        addresses += (row + strip % TILE_STRIPS * STRIP_BYTES + lane_offset,)
    return addresses


@triton.jit
def advance(addresses, BYTES: tl.constexpr):
    """Addresses BYTES on."""
    advanced = ()
    for i in tl.static_range(len(addresses)):
        advanced += (addresses[i] + BYTES,)
    return advanced


@triton.jit
def tiles_to(step: tl.constexpr, last, WARPS: tl.constexpr, STEPS: tl.constexpr, EVEN: tl.constexpr):
    """Tiles from a warp's first one to that of a step; where none is left for it, to the last one."""
    return step * WARPS if EVEN or step < STEPS - 1 else tl.minimum(step * WARPS, last)


@triton.jit
def load_packets(
    ptr,
    k_tile,
    units,
    stride,
    first_strip,
    last_strip,
    lane,
    STRIPS: tl.constexpr,
    UNITS: tl.constexpr,
    UNITS_PER_GROUP: tl.constexpr,
):
    """A lane's part of the scales or zeros of a tile (ptx.packets)."""
    packets = ()
    for i in tl.static_range(ptx.packets(STRIPS, UNITS)):
        pair = tl.minimum(4 * i + lane // 8, UNITS * STRIPS - 1)  # of unit and strip
        strip = tl.minimum(first_strip + pair % STRIPS, last_strip)
        unit = k_tile * UNITS + pair // STRIPS
        group = (unit if UNITS == 1 else tl.minimum(unit, units - 1)) // UNITS_PER_GROUP  # the last tile may lack some
        address = ptr.to(tl.int64) + (strip * 32 + lane % 8 * 4) + (group * stride).to(tl.int64) * 2
        packets += load(address, 1, 1, 0, "r", True)
    return packets


@triton.jit
def load_weights(
    words,  # addresses by run of strips
    thirds,  # those of the third bits of 3-bit codes
    tiles,  # from the addresses on
    k_tile,
    scales_ptr,
    zeros_ptr,
    units,
    stride_sg,
    first_strip,
    last_strip,
    lane,
    BITS: tl.constexpr,
    STRIPS: tl.constexpr,
    RUN: tl.constexpr,
    UNITS: tl.constexpr,
    UNITS_PER_GROUP: tl.constexpr,
):
    """A lane's weights of one tile, in the order of `ptx.multiply_text`."""
    tile = tiles * (TILE_BYTES_PER_BIT * BITS)
    loaded = ()
    for c in tl.static_range(STRIPS):
        for block in tl.static_range(2 if BITS == 4 else 1):
            loaded += load(words[c // RUN] + tile + (block * 2048 + c % RUN * 512), 4, 1, 0, "r", True)
        if BITS == 3:
            loaded += load(thirds[c // RUN] + tile + c % RUN * 256, 2, 1, 0, "r", True)
    place = k_tile, units, stride_sg, first_strip, last_strip, lane
    packets = load_packets(scales_ptr, *place, STRIPS, UNITS, UNITS_PER_GROUP)
    if zeros_ptr is not None:
        packets += load_packets(zeros_ptr, *place, STRIPS, UNITS, UNITS_PER_GROUP)
    return packets + loaded


@triton.jit
def load_x(rows, tiles, BLOCKS: tl.constexpr):
    """A lane's columns of x in one tile, `tiles` from the addresses of its rows on."""
    loaded = ()
    for n in tl.static_range(BLOCKS):
        loaded += load(rows[n] + tiles * X_BYTES, 4, X_VECTORS, 64, "r", False)
    return loaded


@triton.jit
def only_where(valid, weights, PACKETS: tl.constexpr):
    """Weights with scales of 0 where not `valid`."""
    scales = ()
    for i in tl.static_range(PACKETS):
        scales += (tl.where(valid, weights[i], 0),)
    return scales + weights[PACKETS:]
