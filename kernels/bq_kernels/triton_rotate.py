"""The butterfly rotation as one Triton kernel: one block of a few rows stays on chip from load to store."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .format import split_block

TILE = 2048  # elements that several rows of a small block fill together in one program
THREAD_ELEMENTS = 16  # elements of its tile that a thread holds
MAX_WARPS = 16  # 1,024 threads where a warp has 64 lanes


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
):
    RUN: tl.constexpr = 1 << LAYERS
    BLOCK: tl.constexpr = RUNS * RUN
    block = (tl.program_id(0) % blocks).to(tl.int64)  # 64 bits: rows × features may pass 2³¹
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :, None]
    run = tl.arange(0, RUNS_PADDED)[:, None, None]
    feature = block * BLOCK + run * RUN + tl.arange(0, RUN)[None, None, :]
    mask = (run < RUNS) & (row < rows)
    y = tl.load(x + row * x_stride + feature, mask=mask, other=0.0).to(tl.float32)

    if LAYERS > 0:
        HALF: tl.constexpr = RUN // 2
        pair = tl.arange(0, RUNS_PADDED)[:, None] * HALF + tl.arange(0, HALF)[None, :]
        table = cos_sin + block * (LAYERS * BLOCK) + pair
        for j in tl.static_range(LAYERS):
            cos = tl.load(table + j * (BLOCK // 2), mask=pair < BLOCK // 2, other=1.0)
            sin = tl.load(table + (LAYERS + j) * (BLOCK // 2), mask=pair < BLOCK // 2, other=0.0)
            cos = tl.reshape(cos, [RUNS_PADDED, 1, HALF >> j, 1 << j])
            sin = tl.reshape(sin, [RUNS_PADDED, 1, HALF >> j, 1 << j])
            # bit j of the position in the run tells the members of a pair apart: make it the last axis and split
            pairs = tl.reshape(y, [RUNS_PADDED, ROWS, HALF >> j, 2, 1 << j])
            low, high = tl.split(tl.permute(pairs, [0, 1, 2, 4, 3]))
            pairs = tl.join(cos * low - sin * high, sin * low + cos * high)
            y = tl.reshape(tl.permute(pairs, [0, 1, 2, 4, 3]), [RUNS_PADDED, ROWS, RUN])

    if RUNS > 1:
        # Rank-one updates: in a float32 tl.dot threads hold whole rows of the operands, and 13824 = 2⁹·27 spills
        weights = mix + block * (RUNS * RUNS) + run * RUNS
        mixed = tl.full([RUNS_PADDED, ROWS, RUN], 0.0, tl.float32)
        for source in range(RUNS):
            values = tl.sum(tl.where(run == source, y, 0.0), axis=0)[None, :, :]
            mixed += tl.load(weights + source, mask=run < RUNS, other=0.0) * values
        y = mixed
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
        "enable_fp_fusion": True,  # Triton 3.10 turns it off by default
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
    grid = (triton.cdiv(rows, config["ROWS"]) * blocks,)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _rotate_kernel[grid](flat, cos_sin.contiguous(), mix.contiguous(), out, rows, flat.stride(0), blocks, **config)
    return out
