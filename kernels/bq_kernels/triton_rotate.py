"""The butterfly rotation as one Triton kernel: a block of a few rows, or a part of it, stays on chip."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .format import split_block
from .gpu import gpu_of

TILE = 2048  # elements that several rows of a small block fill together in one program
THREAD_ELEMENTS = 16  # elements of its tile that a thread holds
MAX_WARPS = 16  # 1,024 threads where a warp has 64 lanes
# A single program takes microseconds to read the tables of a wide block: a few rows go in two passes, by many programs
# each, and the first takes at most that many layers
FEW_ROWS, WIDE_BLOCK, PASS_LAYERS = 8, 2048, 9
PASS_COLUMNS = 32  # of a program of the second pass


@triton.jit
def butterfly(
    y,
    table,
    pairs,
    LAYERS: tl.constexpr,
    BLOCK: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Butterfly layers FIRST … FIRST + COUNT − 1 of one block, or of several side by side.

    Args:
        y: float32 [rows, runs · COLUMNS], the second a power of two: COLUMNS of the 2^FIRST features of every run that
            the layers before FIRST mix.
        table: points at the table [blocks, 2, LAYERS, BLOCK/2] of the first block, at the first of the columns.
        pairs: pairs of y that have an entry there; others stay as they are.
        LAYERS, BLOCK: k and b of the rotation.
    """
    ROWS: tl.constexpr = y.shape[0]
    WIDTH: tl.constexpr = y.shape[1]
    HALF: tl.constexpr = WIDTH // 2
    PAIRS: tl.constexpr = BLOCK // 2
    pair = tl.arange(0, HALF)
    place = pair // COLUMNS * (1 << FIRST) + pair % COLUMNS
    entry = table + place // PAIRS * (2 * LAYERS * PAIRS) + place % PAIRS + FIRST * PAIRS
    for j in tl.static_range(COUNT):
        cos = tl.load(entry + j * PAIRS, mask=pair < pairs, other=1.0)
        sin = tl.load(entry + (LAYERS + j) * PAIRS, mask=pair < pairs, other=0.0)
        cos = tl.reshape(cos, [1, HALF // (COLUMNS << j), COLUMNS << j])
        sin = tl.reshape(sin, [1, HALF // (COLUMNS << j), COLUMNS << j])
        # one bit of the position tells the members of a pair apart: make it the last axis and split
        low, high = tl.split(tl.permute(tl.reshape(y, [ROWS, HALF // (COLUMNS << j), 2, COLUMNS << j]), [0, 1, 3, 2]))
        turned = tl.join(cos * low - sin * high, sin * low + cos * high)
        y = tl.reshape(tl.permute(turned, [0, 1, 3, 2]), [ROWS, WIDTH])
    return y


@triton.jit
def _rotate_kernel(
    x,
    cos_sin,
    mix,
    out,
    rows,
    x_stride,
    blocks,
    LAYERS: tl.constexpr,  # k
    RUNS: tl.constexpr,  # m
    FIRST: tl.constexpr,  # of the layers that are applied
    COUNT: tl.constexpr,  # of them; after the last layer come the rotations across runs
    HEIGHT: tl.constexpr,  # runs of 2^FIRST features that a program holds
    PADDED: tl.constexpr,  # the next power of two: tiles have no other sizes
    COLUMNS: tl.constexpr,  # features of every such run that it holds
    ROWS: tl.constexpr,  # rows of x in a program
    PDL: tl.constexpr,  # the next kernel may start early, and this one must not read before the last has ended
):
    BLOCK: tl.constexpr = RUNS << LAYERS
    RUN: tl.constexpr = 1 << FIRST
    PARTS: tl.constexpr = BLOCK // (HEIGHT * COLUMNS)  # programs that share a block
    part = tl.program_id(0) % PARTS
    block = (tl.program_id(0) // PARTS % blocks).to(tl.int64)  # 64 bits: rows × features may pass 2³¹
    row = (tl.program_id(0) // PARTS // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    position = tl.arange(0, PADDED * COLUMNS)[None, :]
    # in the first pass parts are stretches of the block, in the second columns of all its runs
    begin = part * COLUMNS if FIRST > 0 else part * HEIGHT
    feature = block * BLOCK + begin + position // COLUMNS * RUN + position % COLUMNS
    mask = (position < HEIGHT * COLUMNS) & (row < rows)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    y = tl.load(x + row * x_stride + feature, mask=mask, other=0.0).to(tl.float32)
    if COUNT > 0:
        table = cos_sin + block * (LAYERS * BLOCK) + (begin if FIRST > 0 else begin // 2)
        y = butterfly(y, table, HEIGHT * COLUMNS // 2, LAYERS, BLOCK, FIRST, COUNT, COLUMNS)
    if RUNS > 1 and FIRST + COUNT == LAYERS:
        # Rank-one updates: in a float32 tl.dot threads hold whole rows of the operands, and 13824 = 2⁹·27 spills
        EACH: tl.constexpr = HEIGHT // RUNS * COLUMNS
        y = tl.reshape(y, [ROWS, PADDED * COLUMNS // EACH, EACH])
        run = tl.arange(0, PADDED * COLUMNS // EACH)[None, :, None]
        weights = mix + block * (RUNS * RUNS) + run * RUNS
        mixed = tl.full([ROWS, PADDED * COLUMNS // EACH, EACH], 0.0, tl.float32)
        for source in range(RUNS):
            values = tl.sum(tl.where(run == source, y, 0.0), axis=1)[:, None, :]
            mixed += tl.load(weights + source, mask=run < RUNS, other=0.0) * values
        y = tl.reshape(mixed, [ROWS, PADDED * COLUMNS])
    tl.store(out + row * (blocks * BLOCK) + feature, y.to(out.dtype.element_ty), mask=mask)


def _pass(rows: int, layers: int, runs: int, first: int, count: int, height: int, columns: int) -> dict[str, int]:
    padded = triton.next_power_of_2(height)
    width = padded * columns
    tile_rows = max(min(triton.next_power_of_2(rows), TILE // width), 1)
    return {
        "LAYERS": layers,
        "RUNS": runs,
        "FIRST": first,
        "COUNT": count,
        "HEIGHT": height,
        "PADDED": padded,
        "COLUMNS": columns,
        "ROWS": tile_rows,
        "num_warps": min(max(width * tile_rows // (32 * THREAD_ELEMENTS), 1), MAX_WARPS),
    }


def launch_configs(rows: int, block_size: int) -> list[dict[str, int]]:
    """Compile-time arguments and compiler options of the rotation kernel, for every launch of it.

    Args:
        rows: rows of x, at least one.
        block_size: b = 2ᵏ·m with m odd.
    """
    layers, runs = split_block(block_size)
    if rows > FEW_ROWS or block_size < WIDE_BLOCK or layers <= PASS_COLUMNS.bit_length():
        return [_pass(rows, layers, runs, 0, layers, block_size, 1)]
    first = min(layers - 1, PASS_LAYERS)
    return [
        _pass(rows, layers, runs, 0, first, 1 << first, 1),
        _pass(rows, layers, runs, first, layers - first, block_size >> first, PASS_COLUMNS),
    ]


def apply_rotation(x: torch.Tensor, cos_sin: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Rotate features by tables from `reference.givens_tables`; float32 inside.

    Args:
        x: [..., n], any float dtype; n = B·b. Read in place where the leading dimensions collapse to one stride.
        cos_sin: float32 [B, 2, k, b/2].
        mix: float32 [B, m, m].

    Returns:
        Q x, shape and dtype of `x`, contiguous.
    """
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if out.numel() == 0:
        return out
    blocks, _, layers, _ = cos_sin.shape
    block_size = mix.shape[-1] << layers
    flat = x.reshape(-1, blocks * block_size)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    rows = flat.shape[0]
    gpu, configs = gpu_of(x), launch_configs(rows, block_size)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        for i, config in enumerate(configs):
            target = out if i == len(configs) - 1 else torch.empty_like(flat, dtype=torch.float32)
            parts = block_size // (config["HEIGHT"] * config["COLUMNS"])
            _rotate_kernel[(triton.cdiv(rows, config["ROWS"]) * blocks * parts,)](
                flat,
                cos_sin.contiguous(),
                mix.contiguous(),
                target,
                rows,
                flat.stride(0),
                blocks,
                **config,
                PDL=gpu.early_launch,
                **gpu.options,
            )
            flat = target
    return out
