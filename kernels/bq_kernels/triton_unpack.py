"""Packed words of a tile to operands of the matrix unit, in registers; shared by all kernels on packed weights.

A code masked in place, q·2ᵖ, *is* a subnormal half-precision number. So one AND and one fused multiply-add turn two
codes into two operands, (q − z₀)·2⁻ᶠ with the mid-rise zero point z₀, exactly; 2ᶠ is undone in float32 once per
output. As int8 an operand is 2·(q − z₀), an odd integer.
"""

import triton
import triton.language as tl

from .format import BITS as _BITS
from .format import midrise_zero
from .tiles import TILE_K as _TILE_K
from .tiles import TILE_N as _TILE_N
from .tiles import WORDS_PER_BIT as _WORDS_PER_BIT

TILE_N, TILE_K = tl.constexpr(_TILE_N), tl.constexpr(_TILE_K)
WORDS_PER_BIT = tl.constexpr(_WORDS_PER_BIT)
_MIDRISE = {bits: midrise_zero(bits) for bits in _BITS}  # compile-time functions cannot call others


@triton.constexpr_function
def midrise(bits):
    """The mid-rise zero point z₀; operands are centred on it."""
    return _MIDRISE[bits]


@triton.constexpr_function
def _doubled_midrise(bits):
    return int(2 * _MIDRISE[bits])


@triton.constexpr_function
def down_scale(dtype):
    """2ᶠ, the factor by which operands are too small: with less, the multiplier of a pair would not be finite."""
    return {"fp16": 2.0**9, "bf16": 2.0**6}.get(dtype.name, 1.0)


@triton.constexpr_function
def _shift(dtype, width, offset):
    """Right shift of a word for the code at bit `offset` of its halves, in steps that the mantissa can hold."""
    if dtype.name == "int8":  # an integer, and not the bits of a number
        return offset
    span = 8 if dtype.name != "bf16" else 6 if width == 2 else 4
    return offset // span * span


@triton.constexpr_function
def _multiplier(dtype, position):
    """Factor from q·2ᵖ, read as a subnormal number (`position` p), to q·2⁻ᶠ."""
    return {"fp16": 2.0 ** (15 - position), "bf16": 2.0 ** (127 - position)}.get(dtype.name, 2.0**-position)


@triton.jit
def load_words(tile_ptr, mask, BITS: tl.constexpr, TILES: tl.constexpr, stride):
    """Words of one tile in each of TILES rows of tiles, `stride` words apart; one tensor per field of the codes."""
    row_ptrs = tile_ptr + tl.arange(0, TILES)[:, None] * stride
    if BITS == 3:
        low = tl.load(row_ptrs + tl.arange(0, 512)[None, :], mask=mask, other=None if mask is None else 0)
        high_ptrs = row_ptrs + 512 + tl.arange(0, 256)[None, :]
        return low, tl.load(high_ptrs, mask=mask, other=None if mask is None else 0)
    else:
        return (tl.load(row_ptrs + tl.arange(0, 256 * BITS)[None, :], mask=mask, other=None if mask is None else 0),)


@triton.jit
def rows_of_tiles(tiles_ptr, pid_n, N, K, TILES: tl.constexpr, BITS: tl.constexpr):
    """Where the outputs of program `pid_n` lie: TILES rows of tiles, one below the other.

    Returns:
        tile_ptr, stride_tn, mask_tiles: of their first tiles, for `load_words`.
        offs_n, mask_n: their outputs [64·TILES].
        stride_sg: of scales and zeros, from group to group.
    """
    n_tiles, k_tiles = tl.cdiv(N, TILE_N), tl.cdiv(K, TILE_K)
    offs_n = pid_n * (TILES * TILE_N) + tl.arange(0, TILES * TILE_N)
    stride_tn = k_tiles.to(tl.int64) * (WORDS_PER_BIT * BITS)
    tile_ptr = tiles_ptr + pid_n * TILES * stride_tn
    mask_tiles = pid_n * TILES + tl.arange(0, TILES)[:, None] < n_tiles
    return tile_ptr, stride_tn, mask_tiles, offs_n, offs_n < N, n_tiles * TILE_N


@triton.jit
def split_words(words, TILES: tl.constexpr, BITS: tl.constexpr):
    """Words as loaded to a tuple of [64·TILES, 4]: for every row, word after word of its four threads."""
    BLOCK_N: tl.constexpr = 64 * TILES
    # tile, block, warp, g, t, row half, word -> row = (tile, warp, row half, g), t, (block, word)
    WORDS: tl.constexpr = 4 if BITS == 4 else 2
    w = tl.reshape(words[0], [TILES, WORDS // 2, 4, 8, 4, 2, 2])
    w = tl.reshape(tl.permute(w, [0, 2, 5, 3, 4, 1, 6]), [BLOCK_N, 4, WORDS])
    if BITS == 4:
        even, odd = tl.split(tl.reshape(w, [BLOCK_N, 4, 2, 2]))
        w0, w2 = tl.split(even)
        w1, w3 = tl.split(odd)
        return w0, w1, w2, w3
    elif BITS == 3:
        w0, w1 = tl.split(w)
        high = tl.permute(tl.reshape(words[1], [TILES, 4, 8, 4, 2]), [0, 1, 4, 2, 3])
        return w0, w1, tl.reshape(high, [BLOCK_N, 4])
    else:
        return tl.split(w)


@triton.jit
def _operand_pair(words, PAIR: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """Codes 2·PAIR and 2·PAIR + 1 of every thread as operands [rows, 4, 2]."""
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    PAIRS_PER_WORD: tl.constexpr = 16 // WIDTH
    OFFSET: tl.constexpr = PAIR % PAIRS_PER_WORD * WIDTH
    SHIFT: tl.constexpr = _shift(dtype, WIDTH, OFFSET)
    POSITION: tl.constexpr = OFFSET - SHIFT
    MASK: tl.constexpr = ((1 << WIDTH) - 1) << POSITION
    word = words[PAIR // PAIRS_PER_WORD]
    word = word >> SHIFT
    if BITS == 3:
        HIGH_SHIFT: tl.constexpr = PAIR - POSITION - 2  # from where the third bit lies to where it belongs
        high = words[2] >> HIGH_SHIFT if HIGH_SHIFT >= 0 else words[2] << -HIGH_SHIFT
        word = (word & (MASK * 65537)) | (high & ((4 << POSITION) * 65537))
    code = tl.join(word.to(tl.int16), (word >> 16).to(tl.int16))
    if BITS != 3:  # masked as 16 bits: the compiler then sees one operation on both halves
        code &= MASK
    if dtype == tl.float32:
        level = code.to(tl.float32) * _multiplier(dtype, POSITION) - midrise(BITS)
    elif dtype == tl.int8:
        level = (code * 2 - _doubled_midrise(BITS)).to(tl.int8)
    else:
        half = code.to(dtype, bitcast=True)
        scale = tl.full(half.shape, _multiplier(dtype, POSITION), dtype)
        level = tl.fma(half, scale, tl.full(half.shape, -midrise(BITS) / down_scale(dtype), dtype))
    return level


@triton.jit
def _stack4(p0, p1, p2, p3):
    return tl.join(tl.join(p0, p2), tl.join(p1, p3))


@triton.jit
def operands(words, FIRST_PAIR: tl.constexpr, PAIRS: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):
    """(q − z₀)·2⁻ᶠ, or int8 2·(q − z₀), of tile columns 8·FIRST_PAIR … 8·(FIRST_PAIR + PAIRS), [rows, 8·PAIRS].

    `words` are those of `split_words`.
    """
    p = ()
    for i in tl.static_range(PAIRS):
        p = p + (_operand_pair(words, FIRST_PAIR + i, BITS, dtype),)
    if PAIRS == 4:
        stacked = _stack4(p[0], p[1], p[2], p[3])
    elif PAIRS == 8:
        stacked = tl.join(_stack4(p[0], p[2], p[4], p[6]), _stack4(p[1], p[3], p[5], p[7]))
    else:
        even = tl.join(_stack4(p[0], p[4], p[8], p[12]), _stack4(p[2], p[6], p[10], p[14]))
        odd = tl.join(_stack4(p[1], p[5], p[9], p[13]), _stack4(p[3], p[7], p[11], p[15]))
        stacked = tl.join(even, odd)
    BLOCK_N: tl.constexpr = stacked.shape[0]
    stacked = tl.reshape(stacked, [BLOCK_N, 4, 2, PAIRS])
    return tl.reshape(tl.permute(stacked, [0, 3, 1, 2]), [BLOCK_N, 8 * PAIRS])


@triton.jit
def gather_codes(tiles_ptr, offs_n, offs_k, K, mask, BITS: tl.constexpr):
    """Codes, int32, at rows `offs_n` and columns `offs_k`, which broadcast: any order, one load per code or two."""
    tile_ptrs = tiles_ptr + (offs_n // TILE_N * tl.cdiv(K, TILE_K) + offs_k // TILE_K).to(tl.int64) * (
        WORDS_PER_BIT * BITS
    )
    # row = (warp, row half, g), column = (chunk, t, side), chunk = (block, word, pair): see tiles.py
    WIDTH: tl.constexpr = 4 if BITS == 4 else 2
    PAIRS_PER_WORD: tl.constexpr = 16 // WIDTH
    row, column = offs_n % TILE_N, offs_k % TILE_K
    thread = (row // 16 * 8 + row % 8) * 4 + column // 2 % 4
    row_half, side, chunk = row // 8 % 2, column % 2, column // 8
    word = chunk // PAIRS_PER_WORD
    index = ((word // 2 * (TILE_N * 2) + thread) * 2 + row_half) * 2 + word % 2
    code = tl.load(tile_ptrs + index, mask=mask, other=0) >> (side * 16 + chunk % PAIRS_PER_WORD * WIDTH)
    code &= (1 << WIDTH) - 1
    if BITS == 3:
        high = tl.load(tile_ptrs + 512 + thread * 2 + row_half, mask=mask, other=0)
        code |= (high >> (side * 16 + chunk) & 1) << 2
    return code
