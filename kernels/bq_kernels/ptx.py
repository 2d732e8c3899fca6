"""Inline PTX of the decode kernel on mma.sync: texts and constraints for `tl.inline_asm_elementwise`.

Triton serves as a SIMT language there: tensors have one element per thread. 16-byte loads into chosen registers,
mma.sync and movmatrix have no other way into it. A text numbers its registers $0, $1, …, outputs first. Everything here
runs on sm_80 and later.

A *strip* is 16 outputs of a tile, what one product covers; a *unit* is the columns that share a scale per output. Lane
4g + t of a warp, (g, t), holds rows g and g + 8 of a strip and sums of rows 2t and 2t + 1 of x.
"""

import triton

from .format import BITS, midrise_zero
from .operands import EXACT_EXPONENT, PAIRS, field_place
from .tiles import FIELDS

# compile-time functions cannot call others
_WIDTHS = {bits: FIELDS[bits][0] for bits in BITS}
_PLACES = {width: [field_place(width, field) for field in range(16 // width)] for width in set(_WIDTHS.values())}
_MIDRISE = {bits: midrise_zero(bits) for bits in BITS}
_EXACT_EXPONENT, _PAIRS = EXACT_EXPONENT, PAIRS
_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
_TOGETHER = 2  # strips whose products alternate, so that none waits for the one before; more cost registers


@triton.constexpr_function
def _half_pair(value):
    """A number in half precision, twice, as the word of a register."""
    import struct

    return str(int.from_bytes(struct.pack("<e", value), "little") * 65537)


@triton.constexpr_function
def _single(value):
    import struct

    return "0f" + struct.pack(">f", value).hex().upper()


@triton.constexpr_function
def _constraints(outputs, *inputs):
    """Constraint string of (number, kind) of outputs and inputs."""
    number, kind = outputs
    return ",".join([f"={kind}"] * number + [kind for count, kind in inputs for _ in range(count)])


@triton.constexpr_function
def shared_text(size):
    """$0 = address of `size` bytes of shared memory; $1 only gives the shape."""
    return f"{{ .shared .align 16 .b8 shared[{size}]; mov.u32 $0, shared; }}"


@triton.constexpr_function
def clear_text():
    """Store 0 at the shared address $1, for all lanes of the warp to read; $0 = 0."""
    return "st.volatile.shared.b32 [$1], 0; bar.warp.sync 0xffffffff; mov.u32 $0, 0;"


@triton.constexpr_function
def load_text(width, vectors, apart, once):
    """$0 … = `vectors` times `width` registers from global memory at the address that comes last.

    Vectors lie `apart` bytes apart. What is read only once leaves the first cache to the rest.
    """
    text, cache, vector = [], ".L1::no_allocate" if once else "", f".v{width}" if width > 1 else ""
    for i in range(vectors):
        registers = ", ".join(f"${width * i + j}" for j in range(width))
        registers = f"{{{registers}}}" if width > 1 else registers
        text.append(f"ld.global{cache}{vector}.b32 {registers}, [${width * vectors}+{apart * i}];")
    return " ".join(text)


@triton.constexpr_function
def load_constraints(width, vectors, kind):
    """Constraints of `load_text`; kind: `r` for words, `f` for float32."""
    return _constraints((width * vectors, kind), (1, "l"))


@triton.constexpr_function
def packets(strips, units):
    """Words per lane that hold the scales of a tile in half precision, a 128-byte packet each (`_transpose`)."""
    return -(-strips * units // 4)


@triton.constexpr_function
def _transpose(name, source, strips, units):
    """Turn packets of scales or zeros around: name0, name1, ….

    A packet holds, for four pairs of unit and strip, 16 outputs in a row: an 8 × 8 matrix of half precision in which
    lane (g, t) has columns 2t and 2t + 1 of row g. Transposed, it has those of outputs g and g + 8 of pair t.
    """
    text = []
    for i in range(packets(strips, units)):
        text += [f".reg .b32 {name}{i}; movmatrix.sync.aligned.m8n8.trans.b16 {name}{i}, ${source + i};"]
    return text


@triton.constexpr_function
def _share(name, u, c, strips):
    """Scales or zeros name(c, row half) of a unit and strip in float32, from the lane of the same g that has them."""
    packet, t = divmod(u * strips + c, 4)
    text = f"shfl.sync.idx.b32 pair, {name}{packet}, {t}, 0x1c1f, 0xffffffff; mov.b32 {{low, high}}, pair;"
    return [text, f"cvt.f32.f16 {name}{c}_0, low; cvt.f32.f16 {name}{c}_1, high;"]


@triton.constexpr_function
def _word(first, c, half, number, bits):
    """Register of a word of strip c; those of a tile lie by strip, block of 16 bytes, row half and word."""
    return f"${first + 2 * bits * c + number // 2 * 4 + 2 * half + number % 2}"


@triton.constexpr_function
def _rotated(first, c, half, number, bits):
    """Rotate a word once for each of the rotations of its fields: v(c, row half, number, rotation)."""
    rotations = sorted({place[0] for place in _PLACES[_WIDTHS[bits]]} - {0})
    word, names = _word(first, c, half, number, bits), [f"v{c}_{half}_{number}_{r}" for r in rotations]
    return [
        f".reg .b32 {name}; shf.r.wrap.b32 {name}, {word}, {word}, {r};"
        for name, r in zip(names, rotations, strict=True)
    ]


@triton.constexpr_function
def _operand(target, first, c, half, pair, bits, exact):
    """A pair of codes of strip c, as q·2ᵖ in the place where they lie; with `exact`, as (q − z₀)·2⁻⁹."""
    width = _WIDTHS[bits]
    number, field = divmod(pair, 16 // width)
    rotation, position, _ = _PLACES[width][field]
    word = f"v{c}_{half}_{number}_{rotation}" if rotation else _word(first, c, half, number, bits)
    text = [f"and.b32 {target}, {word}, {((1 << width) - 1 << position) * 65537};"]
    if bits == 3:  # the third bits of pair i are bit i of the halves of their word, which follows the others
        high, third = f"${first + 6 * c + 4 + half}", (pair - (width * field + 2) + rotation) % 32
        text += [f"shf.r.wrap.b32 third, {high}, {high}, {third};"]
        text += [f"and.b32 third, third, {(4 << position) * 65537}; or.b32 {target}, {target}, third;"]
    if exact:
        text += [f"fma.rn.f16x2 {target}, {target}, up{position}, centre;"]
    return text


@triton.constexpr_function
def multiply_text(bits, strips, blocks, units, exact, float_zeros, fenced):
    """Sums of 16·`strips` outputs and 8·`blocks` rows of x, plus the products of a tile.

    Out: sums (n, c, row half, side). In: packets of scales, and of zeros where there are any; 2·`bits` words of every
    strip; 16·`blocks` words of x (n, pair); 4·`units`·`blocks` factors (u, n, side, (−Σx̂, power of two)); the sums so
    far; where `fenced`, the shared address of a 0.

    A fence holds back the products until what stands before them has been asked for: else ptxas moves loads that only
    a later tile needs behind them. Memory is read in order, so the products are made to depend on that 0.
    """
    sums = 4 * blocks * strips
    scales, zeros = sums, sums + packets(strips, units)
    words = zeros + (packets(strips, units) if float_zeros else 0)
    x = words + 2 * bits * strips
    factors = x + _PAIRS * blocks
    before = factors + 4 * units * blocks
    per_unit, per_word = _PAIRS // units, 16 // _WIDTHS[bits]
    values = [f"{v}{c}_{half}" for v in ("s", "z") for c in range(strips) for half in range(2)]
    text = ["{ .reg .b32 a<4>, third, pair; .reg .b16 low, high;"]
    text += [
        f".reg .f32 {', '.join([f'd{i}' for i in range(sums)] + [f'start{i}' for i in range(2 * blocks)] + values)};"
    ]
    if exact:
        for position in sorted({place[1] for place in _PLACES[_WIDTHS[bits]]}):
            text += [f".reg .b32 up{position}; mov.b32 up{position}, {_half_pair(2.0 ** (15 - position))};"]
        text += [f".reg .b32 centre; mov.b32 centre, {_half_pair(-_MIDRISE[bits] * 2.0**-_EXACT_EXPONENT)};"]
    operands = [f"${x + i}" for i in range(_PAIRS * blocks)]
    if fenced:
        text += [f".reg .b32 fence; bar.warp.sync 0xffffffff; ld.volatile.shared.b32 fence, [${before + sums}];"]
        for i in range(0, _PAIRS * blocks, per_unit):
            text += [f".reg .b32 x{i}; xor.b32 x{i}, {operands[i]}, fence;"]
            operands[i] = f"x{i}"
    text += _transpose("s", scales, strips, units)
    text += _transpose("z", zeros, strips, units) if float_zeros else []
    for u in range(units):
        for i in range(2 * blocks) if not float_zeros and not exact else ():
            minus_sum, power = (f"${factors + 4 * u * blocks + 2 * i + j}" for j in range(2))
            text += [f"mul.f32 start{i}, {minus_sum}, {_single(_MIDRISE[bits])}; mul.f32 start{i}, start{i}, {power};"]
        for first in range(0, strips, _TOGETHER):
            group = range(first, min(first + _TOGETHER, strips))
            for pair in range(u * per_unit, (u + 1) * per_unit, 2):
                for c in group:
                    if pair % per_word == 0:
                        text += [t for half in range(2) for t in _rotated(words, c, half, pair // per_word, bits)]
                    for i in range(4):
                        text += _operand(f"a{i}", words, c, i % 2, pair + i // 2, bits, exact)
                    for n in range(blocks):
                        d = [f"d{4 * (n * strips + c) + i}" for i in range(4)]
                        b = operands[_PAIRS * n + pair : _PAIRS * n + pair + 2]
                        so_far = d if pair > u * per_unit else ["0f00000000"] * 4
                        d, b, so_far = (f"{{{', '.join(registers)}}}" for registers in (d, b, so_far))
                        text += [f"{_MMA} {d}, {{a0, a1, a2, a3}}, {b}, {so_far};"]
            for c in group:
                text += _share("s", u, c, strips)
                text += _share("z", u, c, strips) if float_zeros else []
                for half in range(2) if float_zeros and exact else ():
                    text += [f"sub.f32 z{c}_{half}, z{c}_{half}, {_single(_MIDRISE[bits])};"]
                for n, i in [(n, i) for n in range(blocks) for i in range(4)]:
                    j, factor = 4 * (n * strips + c) + i, factors + 4 * (u * blocks + n) + 2 * (i % 2)
                    if float_zeros:
                        text += [f"fma.rn.f32 d{j}, ${factor}, z{c}_{i // 2}, d{j};"]
                    if float_zeros or exact:
                        text += [f"mul.f32 d{j}, d{j}, ${factor + 1};"]
                    else:
                        text += [f"fma.rn.f32 d{j}, d{j}, ${factor + 1}, start{2 * n + i % 2};"]
                    so_far = f"${before + j}" if u == 0 else f"${j}"
                    text += [f"fma.rn.f32 ${j}, d{j}, s{c}_{i // 2}, {so_far};"]
    return " ".join([*text, "}"])


@triton.constexpr_function
def multiply_constraints(bits, strips, blocks, units, float_zeros, fenced):
    """Constraints of `multiply_text`."""
    sums, scales = 4 * blocks * strips, packets(strips, units) * (2 if float_zeros else 1)
    words = (scales + 2 * bits * strips + _PAIRS * blocks, "r")
    return _constraints((sums, "f"), words, (4 * units * blocks + sums, "f"), (1 if fenced else 0, "r"))


@triton.constexpr_function
def sum_text(strips, warps, each):
    """Sums over all warps: a thread's `each` are number o·threads + thread of (c, lane, (row half, side)).

    In: shared address of four sums of the thread; `each` addresses of a number's part of the first warp; 4·`strips`
    sums. The first strip lies in front, 16 bytes per thread, then the next.
    """
    text = [f"{{ .reg .f32 part<{warps}>;"]
    for c in range(strips):
        values = ", ".join(f"${2 * each + 1 + 4 * c + i}" for i in range(4))
        text += [f"st.shared.v4.f32 [${each}+{c * warps * 512}], {{{values}}};"]
    text += ["bar.sync 0;"]
    for o in range(each):
        text += [f"ld.shared.f32 part{warp}, [${each + 1 + o}+{warp * 512}];" for warp in range(warps)]
        width = warps
        while width > 1:
            width //= 2
            text += [f"add.f32 part{i}, part{i}, part{i + width};" for i in range(width)]
        text += [f"mov.f32 ${o}, part0;"]
    return " ".join([*text, "}"])


@triton.constexpr_function
def sum_constraints(strips, each):
    """Constraints of `sum_text`."""
    return _constraints((each, "f"), (1 + each, "r"), (4 * strips, "f"))
