"""Inline PTX of the decode kernel on mma.sync: texts and constraints for `tl.inline_asm_elementwise`.

Triton serves as a SIMT language there: tensors have one element per thread. Copies into shared memory that complete
later (cp.async), 16-byte loads and mma.sync have no other way into it. A text numbers its registers $0, $1, …, outputs
first. Everything here runs on sm_80 and later.

A *strip* is 16 outputs of a tile, what one product covers; a *unit* is the columns that share a scale per output.
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
    return f"{{ .shared .align 16 .b8 ring[{size}]; mov.u32 $0, ring; }}"


@triton.constexpr_function
def load_text(vectors, apart):
    """$0 … = 4·`vectors` registers from global memory at the address that comes last, `apart` bytes between vectors."""
    registers = ["{" + ", ".join(f"${4 * i + j}" for j in range(4)) + "}" for i in range(vectors)]
    return " ".join(f"ld.global.v4.b32 {to}, [${4 * vectors}+{apart * i}];" for i, to in enumerate(registers))


@triton.constexpr_function
def load_constraints(vectors, kind):
    """Constraints of `load_text`; kind: `r` for words, `f` for float32."""
    return _constraints((4 * vectors, kind), (1, "l"))


@triton.constexpr_function
def request_text(bits, strips, float_zeros, scale_bytes):
    """Ask for a lane's share of a stage in shared memory, as one group of copies.

    In: $1 shared, $2 global address of its words, $3 whether to copy them; $4 shared, $5 global address of 8 scales,
    $6 whether to copy those; then global address of 8 zeros where there are any, `scale_bytes` behind the scales in
    shared memory; then shared, global address of the third bits of 3-bit codes. Out: $0 = 0.
    """
    text = ["{ .reg .pred words, scales; setp.ne.s32 words, $3, 0; setp.ne.s32 scales, $6, 0;"]
    for block in range(2 if bits == 4 else 1):
        for c in range(strips):
            to, source = (block * strips + c) * 512, block * 2048 + c * 512
            text += [f"@words cp.async.cg.shared.global [$1+{to}], [$2+{source}], 16;"]
    text += ["@scales cp.async.cg.shared.global [$4], [$5], 16;"]
    if float_zeros:
        text += [f"@scales cp.async.cg.shared.global [$4+{scale_bytes}], [$7], 16;"]
    if bits == 3:
        first = 8 if float_zeros else 7
        for c in range(strips):
            text += [f"@words cp.async.ca.shared.global [${first}+{c * 256}], [${first + 1}+{c * 256}], 8;"]
    return " ".join([*text, "cp.async.commit_group; mov.u32 $0, 0; }"])


@triton.constexpr_function
def request_constraints(bits, float_zeros):
    """Constraints of `request_text`."""
    return "=r,r,l,r,r,l,r" + (",l" if float_zeros else "") + (",r,l" if bits == 3 else "")


@triton.constexpr_function
def arrive_text(pending):
    """Wait until all but the last `pending` groups of copies have arrived, those of the other lanes of the warp too."""
    return f"cp.async.wait_group {pending}; bar.warp.sync 0xffffffff; mov.u32 $0, 0;"


@triton.constexpr_function
def _load_words(bits, strips, words, high):
    """Words of a lane from shared memory: w(c, row half, number); third bits h(c, row half)."""
    text = []
    for block in range(2 if bits == 4 else 1):
        for c in range(strips):
            names = ", ".join(f"w{c}{half}{2 * block + i}" for half in range(2) for i in range(2))
            text += [f".reg .b32 {names};", f"ld.shared.v4.b32 {{{names}}}, [{words}+{(block * strips + c) * 512}];"]
    if bits == 3:
        for c in range(strips):
            text += [f".reg .b32 h{c}0, h{c}1;", f"ld.shared.v2.b32 {{h{c}0, h{c}1}}, [{high}+{c * 256}];"]
    return text


@triton.constexpr_function
def _rotated(name, bits):
    """Rotate a word once for each of the rotations of its fields: v_name_rotation."""
    rotations = sorted({place[0] for place in _PLACES[_WIDTHS[bits]]} - {0})
    return [f".reg .b32 v_{name}_{r}; shf.r.wrap.b32 v_{name}_{r}, {name}, {name}, {r};" for r in rotations]


@triton.constexpr_function
def _operand(target, c, half, pair, bits, exact):
    """A pair of codes of strip c, as q·2ᵖ in the place where they lie; with `exact`, as (q − z₀)·2⁻⁹."""
    width = _WIDTHS[bits]
    number, field = divmod(pair, 16 // width)
    rotation, position, _ = _PLACES[width][field]
    word = f"v_w{c}{half}{number}_{rotation}" if rotation else f"w{c}{half}{number}"
    text = [f"and.b32 {target}, {word}, {((1 << width) - 1 << position) * 65537};"]
    if bits == 3:  # the third bits of pair i are bit i of the halves of their word
        third = (pair - (width * field + 2) + rotation) % 32
        text += [f"shf.r.wrap.b32 third, h{c}{half}, h{c}{half}, {third};"]
        text += [f"and.b32 third, third, {(4 << position) * 65537}; or.b32 {target}, {target}, third;"]
    if exact:
        text += [f"fma.rn.f16x2 {target}, {target}, up{position}, centre;"]
    return text


@triton.constexpr_function
def _begin_unit(u, bits, strips, blocks, exact, float_zeros, scales, sums, scale_bytes):
    """Scales s(c, row half) of a unit, and the start z·(−Σx̂) of its sums d(n, c, i), i = (row half, side)."""
    text, centre = [], _MIDRISE[bits] if exact else 0.0
    for c in range(strips):
        for half in range(2):
            at = (u * strips + c) * 32 + half * 16
            text += [f"ld.shared.u16 bits, [{scales}+{at}]; cvt.f32.f16 s{c}{half}, bits;"]
            if float_zeros:
                text += [f"ld.shared.u16 bits, [{scales}+{at + scale_bytes}]; cvt.f32.f16 z{c}{half}, bits;"]
                text += [f"sub.f32 z{c}{half}, z{c}{half}, {_single(centre)};"] if exact else []
    for n in range(blocks):
        for c in range(strips):
            for i in range(4):
                minus_sum = f"${sums + 4 * (u * blocks + n) + 2 * (i % 2)}"
                if float_zeros:
                    text += [f"mul.f32 d{n}{c}{i}, {minus_sum}, z{c}{i // 2};"]
                elif exact:
                    text += [f"mov.f32 d{n}{c}{i}, 0f00000000;"]
                else:
                    text += [f"mul.f32 d{n}{c}{i}, {minus_sum}, {_single(_MIDRISE[bits])};"]
    return text


@triton.constexpr_function
def multiply_text(bits, strips, blocks, units, exact, float_zeros, scale_bytes):
    """Sums of 16·`strips` outputs and 8·`blocks` rows of x, plus the products of a stage.

    Out: sums (n, c, row half, side). In: shared addresses of the lane's words, of its scales, and of its third bits;
    16·`blocks` words of x (n, pair); 4·`units`·`blocks` factors (u, n, side, (−Σx̂, power of two)); the sums so far.
    """
    sums = 4 * blocks * strips
    words, scales, high, x = f"${sums}", f"${sums + 1}", f"${sums + 2}", sums + 3
    factors = x + _PAIRS * blocks
    before = factors + 4 * units * blocks
    tiles = [(n, c) for n in range(blocks) for c in range(strips)]
    text = ["{ .reg .b32 a<4>, third; .reg .b16 bits; .reg .f32 product;"]
    text += [f".reg .f32 {', '.join(f'd{n}{c}{i}' for n, c in tiles for i in range(4))};"]
    text += [f".reg .f32 {', '.join(f'{v}{c}{half}' for v in 'sz' for c in range(strips) for half in range(2))};"]
    if exact:
        for position in sorted({place[1] for place in _PLACES[_WIDTHS[bits]]}):
            text += [f".reg .b32 up{position}; mov.b32 up{position}, {_half_pair(2.0 ** (15 - position))};"]
        text += [f".reg .b32 centre; mov.b32 centre, {_half_pair(-_MIDRISE[bits] * 2.0**-_EXACT_EXPONENT)};"]
    text += _load_words(bits, strips, words, high)
    numbers = range(_WIDTHS[bits])
    text += [t for c in range(strips) for h in range(2) for i in numbers for t in _rotated(f"w{c}{h}{i}", bits)]
    for u in range(units):
        text += _begin_unit(u, bits, strips, blocks, exact, float_zeros, scales, factors, scale_bytes)
        for pair in range(u * _PAIRS // units, (u + 1) * _PAIRS // units, 2):
            for c in range(strips):
                for i in range(4):
                    text += _operand(f"a{i}", c, i % 2, pair + i // 2, bits, exact)
                for n in range(blocks):
                    d = ", ".join(f"d{n}{c}{i}" for i in range(4))
                    b = f"${x + _PAIRS * n + pair}, ${x + _PAIRS * n + pair + 1}"
                    text += [f"{_MMA} {{{d}}}, {{a0, a1, a2, a3}}, {{{b}}}, {{{d}}};"]
        for n, c in tiles:
            for i in range(4):
                j = 4 * (n * strips + c) + i
                so_far = f"${before + j}" if u == 0 else f"${j}"
                power = f"${factors + 4 * (u * blocks + n) + 2 * (i % 2) + 1}"
                text += [f"mul.f32 product, d{n}{c}{i}, {power}; fma.rn.f32 ${j}, product, s{c}{i // 2}, {so_far};"]
    return " ".join([*text, "}"])


@triton.constexpr_function
def multiply_constraints(strips, blocks, units):
    """Constraints of `multiply_text`."""
    sums = 4 * blocks * strips
    return _constraints((sums, "f"), (3 + _PAIRS * blocks, "r"), (4 * units * blocks + sums, "f"))
