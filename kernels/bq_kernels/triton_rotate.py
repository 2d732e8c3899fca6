"""The butterfly rotation as one Triton kernel: one block of a few rows stays on chip from load to store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .format import split_block
from .gpu import gpu_of

TILE = 2048  # elements that several rows of a small block fill together in one program
THREAD_ELEMENTS = 16  # elements of its tile that a thread holds
MAX_WARPS = 16  # 1,024 threads where a warp has 64 lanes


@triton.jit
def butterfly(y, cos_sin, pairs, LAYERS: tl.constexpr, BLOCK: tl.constexpr):
    """The butterfly layers of one block, or of several side by side.

    Args:
        y: float32 [rows, width], width a power of two.
        cos_sin: points at the table [blocks, 2, LAYERS, BLOCK/2] of the first block.
        pairs: pairs that have an entry there; beyond, y stays as it is.
    """
    ROWS: tl.constexpr = y.shape[0]
    WIDTH: tl.constexpr = y.shape[1]
    HALF: tl.constexpr = WIDTH // 2
    pair = tl.arange(0, HALF)
    table = cos_sin + pair // (BLOCK // 2) * (LAYERS * BLOCK) + pair % (BLOCK // 2)
    for j in tl.static_range(LAYERS):
        cos = tl.load(table + j * (BLOCK // 2), mask=pair < pairs, other=1.0)
        sin = tl.load(table + (LAYERS + j) * (BLOCK // 2), mask=pair < pairs, other=0.0)
        cos = tl.reshape(cos, [1, HALF >> j, 1 << j])
        sin = tl.reshape(sin, [1, HALF >> j, 1 << j])
        # bit j of the position tells the members of a pair apart: make it the last axis and split
        low, high = tl.split(tl.permute(tl.reshape(y, [ROWS, HALF >> j, 2, 1 << j]), [0, 1, 3, 2]))
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
    RUNS_PADDED: tl.constexpr,  # the next power of two: tiles have no other sizes
    ROWS: tl.constexpr,  # rows of x in a program
    PDL: tl.constexpr,  # the next kernel may start early, and this one must not read before the last has ended
):
    RUN: tl.constexpr = 1 << LAYERS
    BLOCK: tl.constexpr = RUNS * RUN
    block = (tl.program_id(0) % blocks).to(tl.int64)  # 64 bits: rows × features may pass 2³¹
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    position = tl.arange(0, RUNS_PADDED * RUN)[None, :]
    feature = block * BLOCK + position
    mask = (position < BLOCK) & (row < rows)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    y = tl.load(x + row * x_stride + feature, mask=mask, other=0.0).to(tl.float32)
    if LAYERS > 0:
        y = butterfly(y, cos_sin + block * (LAYERS * BLOCK), BLOCK // 2, LAYERS, BLOCK)
    if RUNS > 1:
        # Rank-one updates: in a float32 tl.dot threads hold whole rows of the operands, and 13824 = 2⁹·27 spills
        y = tl.reshape(y, [ROWS, RUNS_PADDED, RUN])
        run = tl.arange(0, RUNS_PADDED)[None, :, None]
        weights = mix + block * (RUNS * RUNS) + run * RUNS
        mixed = tl.full([ROWS, RUNS_PADDED, RUN], 0.0, tl.float32)
        for source in range(RUNS):
            values = tl.sum(tl.where(run == source, y, 0.0), axis=1)[:, None, :]
            mixed += tl.load(weights + source, mask=run < RUNS, other=0.0) * values
        y = tl.reshape(mixed, [ROWS, RUNS_PADDED * RUN])
    tl.store(out + row * (blocks * BLOCK) + feature, y.to(out.dtype.element_ty), mask=mask)


def launch_config(rows: int, block_size: int) -> dict[str, int]:
    """Compile-time arguments and compiler options of the rotation kernel.

    Args:
        rows: rows of x, at least one.
        block_size: b = 2ᵏ·m with m odd.
    """
    layers, runs = split_block(block_size)
    padded = triton.next_power_of_2(runs)
    tile_rows = max(min(triton.next_power_of_2(rows), TILE // (padded << layers)), 1)
    warps = (padded << layers) * tile_rows // (32 * THREAD_ELEMENTS)
    return {
        "LAYERS": layers,
        "RUNS": runs,
        "RUNS_PADDED": padded,
        "ROWS": tile_rows,
        "num_warps": min(max(warps, 1), MAX_WARPS),
    }


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
    config = launch_config(rows, block_size)
    gpu = gpu_of(x)
    grid = (triton.cdiv(rows, config["ROWS"]) * blocks,)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _rotate_kernel[grid](
            flat,
            cos_sin.contiguous(),
            mix.contiguous(),
            out,
            rows,
            flat.stride(0),
            blocks,
            **config,
            PDL=gpu.early_launch,
            **gpu.options,
        )
    return out
