"""The packed linear of a mixture's experts: every row of x meets the weights of the expert that it is sent to.

Rows are sorted by expert into blocks of one expert each; a program takes one block and some tiles of outputs, as the
GEMM kernel does. Nothing depends on the routing but the contents of two index tensors, so a CUDA graph can hold it.
No GPU has run it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .format import GROUP_MULTIPLE
from .gpu import gpu_of
from .tiles import tile_bits, unit_of
from .triton_rotate import apply_rotation
from .triton_unpack import (
    TILE_K,
    TILE_N,
    WORDS_PER_BIT,
    down_scale,
    load_words,
    midrise,
    operands,
    rows_of_tiles,
    split_words,
)

BLOCK_ROWS = (16, 32, 64)  # rows per program
WARPS, STAGES = 4, 3


@triton.jit
def _grouped_kernel(
    x_ptr,
    rows_ptr,  # int32 [blocks, BLOCK_M]: row of the result, -1 for none
    experts_ptr,  # int32 [blocks]: expert of a block, -1 for none
    tiles_ptr,
    scales_ptr,
    zeros_ptr,  # None: mid-rise levels
    out_ptr,
    stride_xm,
    stride_te,  # of tiles, from expert to expert
    stride_se,  # of scales and zeros
    K,
    N,
    FANOUT: tl.constexpr,  # rows of the result per row of x
    BITS: tl.constexpr,
    UNIT: tl.constexpr,  # columns per tl.dot; they share a scale
    UNITS_PER_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    STAGES: tl.constexpr,
):
    PAIRS: tl.constexpr = UNIT // 8
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pid_n, pid_m = tl.program_id(0), tl.program_id(1)
    expert = tl.load(experts_ptr + pid_m).to(tl.int64)
    if expert >= 0:
        tiles_ptr += expert * stride_te
        scales_ptr += expert * stride_se
        rows = tl.load(rows_ptr + pid_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
        tile_ptr, stride_tn, mask_tiles, offs_n, mask_n, stride_sg = rows_of_tiles(tiles_ptr, pid_n, N, K, 1, BITS)
        acc = tl.full([TILE_N, BLOCK_M], 0.0, tl.float32)
        for k_tile in tl.range(0, tl.cdiv(K, TILE_K), num_stages=STAGES):
            words = load_words(tile_ptr + k_tile * (WORDS_PER_BIT * BITS), mask_tiles, BITS, 1, stride_tn)
            words = split_words(words, 1, BITS)
            for u in tl.static_range(TILE_K // UNIT):
                start_k = k_tile * TILE_K + u * UNIT
                offs_k = start_k + tl.arange(0, UNIT)[None, :]
                x_ptrs = x_ptr + tl.maximum(rows, 0) // FANOUT * stride_xm + offs_k
                x = tl.load(x_ptrs, mask=(rows >= 0) & (offs_k < K), other=0.0)
                # the last tile may hold fewer columns than units
                offs_g = tl.minimum(start_k, K - 1) // (UNIT * UNITS_PER_GROUP) * stride_sg
                scale = tl.load(scales_ptr + offs_g + offs_n, mask=mask_n, other=0.0).to(tl.float32)
                weight = operands(words, u * PAIRS, PAIRS, BITS, dtype)
                if zeros_ptr is not None:
                    zero_ptrs = zeros_ptr + expert * stride_se + offs_g + offs_n
                    zero = tl.load(zero_ptrs, mask=mask_n, other=0.0).to(tl.float32) - midrise(BITS)
                    weight -= (zero / down_scale(dtype)).to(dtype)[:, None]
                acc += tl.dot(weight, tl.trans(x), input_precision="ieee") * scale[:, None]
        acc *= down_scale(dtype)
        out_ptrs = out_ptr + rows * N + offs_n[None, :]
        tl.store(out_ptrs, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=(rows >= 0) & mask_n[None, :])


def blocks_of_experts(experts: torch.Tensor, count: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows sorted by expert, cut into blocks of one expert each; without waiting for the device.

    Args:
        experts: int [rows], the expert of each; -1 for none.
        count: of experts.
        block: rows per block.

    Returns:
        int32 [blocks, block], rows, -1 where a block is not full; and int32 [blocks], their experts, -1 for blocks that
        are not needed: there are as many as any routing can need.
    """
    rows, device = len(experts), experts.device
    blocks = min(rows, triton.cdiv(rows, block) + count)
    experts = torch.where(experts < 0, count, experts.long())  # those of none come last
    order = experts.argsort(stable=True)
    ordered = experts[order]
    numbers = torch.arange(count + 1, device=device)
    first = torch.searchsorted(ordered, numbers)  # of an expert's rows
    sizes = torch.searchsorted(ordered, numbers, right=True) - first
    ends = ((sizes[:count] + block - 1) // block).cumsum(0)  # of an expert's blocks
    starts = torch.cat((ends.new_zeros(1), ends))[: count + 1]
    place = starts[ordered] * block + torch.arange(rows, device=device) - first[ordered]
    # rows of none go into a block of their own behind the others, which is cut off
    table = torch.full(((blocks + 1) * block,), -1, dtype=torch.int32, device=device)
    place = torch.where(ordered < count, place, blocks * block)
    table.scatter_(0, place, order.int())
    of_block = torch.searchsorted(ends, torch.arange(blocks, device=device), right=True)
    of_block = torch.where(of_block < count, of_block, -1)
    return table[: blocks * block].view(blocks, block), of_block.int()


def grouped_linear(
    x: torch.Tensor,
    experts: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    out_features: int,
    cos_sin: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
) -> torch.Tensor:
    """W′ₑ (Q x) for the experts e of every row; arguments and result as `tiles.grouped_linear`.

    Raises:
        ValueError: if groups are not a multiple of 32 columns.
    """
    (rows, fanout), (count, in_features) = experts.shape, (len(tiles), x.shape[1])
    group_size = in_features // scales.shape[1]
    if group_size % GROUP_MULTIPLE:
        raise ValueError(f"the kernels need groups of a multiple of {GROUP_MULTIPLE} columns, not {group_size}")
    out = x.new_zeros(rows, fanout, out_features)
    if rows == 0:
        return out
    x = x.contiguous() if cos_sin is None else apply_rotation(x.contiguous(), cos_sin, mix)
    most = rows * fanout // count
    block = next((size for size in BLOCK_ROWS if size >= most), BLOCK_ROWS[-1])
    table, of_block = blocks_of_experts(experts.flatten(), count, block)
    gpu = gpu_of(x)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _grouped_kernel[(tiles.shape[1], len(of_block))](
            x,
            table,
            of_block,
            tiles,
            scales,
            zeros,
            out,
            x.stride(0),
            tiles.stride(0),
            scales.stride(0),
            in_features,
            out_features,
            **launch_config(tile_bits(tiles), group_size, fanout, block),
            **gpu.options,
        )
    return out


def launch_config(bits: int, group_size: int, fanout: int, block: int) -> dict[str, int]:
    """Compile-time arguments and compiler options of the kernel.

    Args:
        bits: bits per code.
        group_size: columns that share a scale, a multiple of 32.
        fanout: experts per row of x.
        block: rows per program, of BLOCK_ROWS.
    """
    unit = unit_of(group_size)
    return {
        "FANOUT": fanout,
        "BITS": bits,
        "UNIT": unit,
        "UNITS_PER_GROUP": group_size // unit,
        "BLOCK_M": block,
        "STAGES": STAGES,
        "num_warps": WARPS,
        "num_stages": STAGES,
    }
