"""What the kernels on packed weights share: words of a tile to operands of the matrix unit, in registers.

A code masked in place, q·2ᵖ, *is* a subnormal half-precision number. So one AND and one fused multiply-add turn two
codes into two operands, (q − c)·2⁻ᶠ with c = (2^bits − 1)/2, exactly; 2ᶠ is undone in float32 once per output.
"""

import triton
import triton.language as tl

from .tiles import COLUMNS, ROWS, WORDS

TILE_ROWS, TILE_COLUMNS, TILE_WORDS = tl.constexpr(ROWS), tl.constexpr(COLUMNS), tl.constexpr(WORDS)


def unit_of(group: int) -> int:
    """Columns that one product takes: within a tile, and of one scale when `group` columns share one."""
    return min(group & -group, COLUMNS)


@triton.constexpr_function
def centre(bits):
    """c, the middle of the codes."""
    return (2**bits - 1) / 2


@triton.constexpr_function
def down_scale(dtype):
    """2ᶠ, what operands are too small by: with less, the multiplier of a pair would not be a finite number."""
    return {"fp16": 2.0**9, "bf16": 2.0**6}.get(dtype.name, 1.0)


@triton.constexpr_function
def _shift(dtype, width, offset):
    """How far a word is shifted for the code at bit `offset` of its halves: in steps of what the mantissa holds."""
    span = 8 if dtype.name != "bf16" else 6 if width == 2 else 4
    return offset // span * span


@triton.constexpr_function
def _multiplier(dtype, place):
    """What takes q·2ᵖ, read as a subnormal number, to q·2⁻ᶠ."""
    return {"fp16": 2.0 ** (15 - place), "bf16": 2.0 ** (127 - place)}.get(dtype.name, 2.0**-place)


@triton.jit
def load_words(tile, mask, BITS: tl.constexpr, TILES: tl.constexpr, stride):
    """Words of one tile in each of TILES rows of tiles, `stride` words apart; one tensor a field of the codes."""
    first = tile + tl.arange(0, TILES)[:, None] * stride
    if BITS == 3:
        low = tl.load(first + tl.arange(0, 512)[None, :], mask=mask, other=None if mask is None else 0)
        return low, tl.load(first + 512 + tl.arange(0, 256)[None, :], mask=mask, other=None if mask is None else 0)
    else:
        return (tl.load(first + tl.arange(0, 256 * BITS)[None, :], mask=mask, other=None if mask is None else 0),)


@triton.jit
def split_words(words, TILES: tl.constexpr, BITS: tl.constexpr):
    """Words as loaded to a tuple of [64·TILES, 4]: for every row, word after word of its four threads."""
    ROWS_: tl.constexpr = 64 * TILES
    # tile, block, warp, g, t, row half, word -> row = (tile, warp, row half, g), t, (block, word)
    WIDE: tl.constexpr = 4 if BITS == 4 else 2
    w = tl.reshape(words[0], [TILES, WIDE // 2, 4, 8, 4, 2, 2])
    w = tl.reshape(tl.permute(w, [0, 2, 5, 3, 4, 1, 6]), [ROWS_, 4, WIDE])
    if BITS == 4:
        even, odd = tl.split(tl.reshape(w, [ROWS_, 4, 2, 2]))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        return w0, w1, w2, w3
    elif BITS == 3:
        w0, w1 = tl.split(w)
        high = tl.permute(tl.reshape(words[1], [TILES, 4, 8, 4, 2]), [0, 1, 4, 2, 3])
        return w0, w1, tl.reshape(high, [ROWS_, 4])
    else:
        return tl.split(w)


@triton.jit
def _pair(words, J: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Pair J of every thread as operands [rows, 4, 2]."""
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    OFFSET: tl.constexpr = J % (16 // WIDTH) * WIDTH
    SHIFT: tl.constexpr = _shift(dtype, WIDTH, OFFSET)
    PLACE: tl.constexpr = OFFSET - SHIFT
    word = words[J // (16 // WIDTH)]
    MASK: tl.constexpr = ((1 << WIDTH) - 1) << PLACE
    word = word >> SHIFT
    if BITS == 3:
        AWAY: tl.constexpr = J - PLACE - 2  # of the third bit, from where it belongs
        high = words[2] >> AWAY if AWAY >= 0 else words[2] << -AWAY
        word = (word & (MASK * 65537)) | (high & ((4 << PLACE) * 65537))
    code = tl.join(word.to(tl.int16), (word >> 16).to(tl.int16))
    if BITS != 3:  # as 16 bits, for then the compiler sees one operation on both halves
        code &= MASK
    if dtype == tl.float32:
        level = code.to(tl.float32) * _multiplier(dtype, PLACE) - centre(BITS)
    else:
        half = code.to(dtype, bitcast=True)
        scale = tl.full(half.shape, _multiplier(dtype, PLACE), dtype)
        level = tl.fma(half, scale, tl.full(half.shape, -centre(BITS) / down_scale(dtype), dtype))
    return level


@triton.jit
def _stack4(p0, p1, p2, p3):
    return tl.join(tl.join(p0, p2), tl.join(p1, p3))


@triton.jit
def operands(words, FIRST: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """(q − c)·2⁻ᶠ of columns 8·FIRST … 8·(FIRST + COUNT) of a tile, [rows, 8·COUNT], from `split_words`."""
    p = ()
    for j in tl.static_range(COUNT):
        p = p + (_pair(words, FIRST + j, BITS, dtype),)
    if COUNT == 4:
        stacked = _stack4(p[0], p[1], p[2], p[3])
    elif COUNT == 8:
        stacked = tl.join(_stack4(p[0], p[2], p[4], p[6]), _stack4(p[1], p[3], p[5], p[7]))
    else:
        even = tl.join(_stack4(p[0], p[4], p[8], p[12]), _stack4(p[2], p[6], p[10], p[14]))
        odd = tl.join(_stack4(p[1], p[5], p[9], p[13]), _stack4(p[3], p[7], p[11], p[15]))
        stacked = tl.join(even, odd)
    ROWS_: tl.constexpr = stacked.shape[0]
    stacked = tl.reshape(stacked, [ROWS_, 4, 2, COUNT])
    return tl.reshape(tl.permute(stacked, [0, 3, 1, 2]), [ROWS_, 8 * COUNT])
