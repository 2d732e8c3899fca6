"""The packed linear for a prefill with int8 activations: codes become int8 in the main loop, sums are int32.

    y = Σ_units scale_x · s/2 · (Σ (2q − (2^bits − 1)) x − 2 (z − z₀) Σ x) + bias,    z₀ the mid-rise zero point

Doubled, mid-rise levels are odd integers. A product over the columns of a unit (up to 128, in one group) is exact in
int32; the scales of the group and of the token's unit meet it in float32.

No GPU has timed it. With 2 bits and groups of 128, the loop for sm_90 has 645 instructions per thread for a product of
64 outputs, 256 tokens and 128 columns (Triton 3.9): 1,290 cycles of issue, where the tensor cores need about 500. So it
should be bound by instructions, near 0.73 ms for 8192² and 4,096 tokens. 192 of them turn sums into float32, scale and
add them; many others carry bytes through shared memory, since codes lie in the order that 16-bit operands need.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .gpu import gpu_of, nearest_capability
from .tiles import tile_bits, unit_of
from .triton_unpack import (
    TILE_K,
    TILE_N,
    WORDS_PER_BIT,
    load_words,
    midrise,
    operands,
    rows_of_tiles,
    split_words,
)

# By capability: tokens and tiles of 64 outputs per program, loads in flight, warps. No GPU has run them
LAUNCHES = {
    "sm90": {"BLOCK_M": 256, "TILES": 1, "STAGES": 3, "num_warps": 8},
    "sm80": {"BLOCK_M": 64, "TILES": 1, "STAGES": 3, "num_warps": 4},
    "gfx942": {"BLOCK_M": 64, "TILES": 1, "STAGES": 2, "num_warps": 4},
}
# Where registers do not hold that, by capability, bits and unit
TIGHT = {
    ("sm90", 4, 32): {"BLOCK_M": 128},
    ("sm90", 4, 64): {"STAGES": 2},
    ("sm80", 3, 64): {"maxnreg": 168},  # the assembler aims at 128, and spills two
}


@triton.jit
def _gemm_int8_kernel(
    x_ptr,
    x_scales_ptr,  # [K / UNIT, M]
    tiles_ptr,
    scales_ptr,
    zeros_ptr,  # None: mid-rise levels
    bias_ptr,  # or None
    out_ptr,
    M,
    K,
    N,
    BITS: tl.constexpr,
    UNIT: tl.constexpr,  # columns per tl.dot; they share a scale, of a token as of an output
    UNITS_PER_GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILES: tl.constexpr,  # tiles of 64 outputs per program
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    BLOCK_N: tl.constexpr = TILES * TILE_N
    PAIRS: tl.constexpr = UNIT // 8
    pid_n, pid_m = tl.program_id(0), tl.program_id(1)
    k_tiles = tl.cdiv(K, TILE_K)
    tile_ptr, stride_tn, mask_tiles, offs_n, mask_n, stride_sg = rows_of_tiles(tiles_ptr, pid_n, N, K, TILES, BITS)
    offs_token = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_m = offs_token[:, None]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()

    acc = tl.full([BLOCK_N, BLOCK_M], 0.0, tl.float32)
    for k_tile in tl.range(0, k_tiles, num_stages=STAGES):
        words = load_words(tile_ptr + k_tile * (WORDS_PER_BIT * BITS), mask_tiles, BITS, TILES, stride_tn)
        words = split_words(words, TILES, BITS)
        for u in tl.static_range(TILE_K // UNIT):
            start_k = k_tile * TILE_K + u * UNIT
            offs_k = start_k + tl.arange(0, UNIT)[None, :]
            x = tl.load(x_ptr + offs_m * K + offs_k, mask=(offs_m < M) & (offs_k < K), other=0)
            # the last tile may hold fewer columns than units
            unit = tl.minimum(start_k, K - 1) // UNIT
            offs_g = unit // UNITS_PER_GROUP * stride_sg
            scale = tl.load(scales_ptr + offs_g + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            weight = operands(words, u * PAIRS, PAIRS, BITS, tl.int8)
            products = tl.dot(weight, tl.trans(x), out_dtype=tl.int32).to(tl.float32)
            if zeros_ptr is not None:
                zero = tl.load(zeros_ptr + offs_g + offs_n, mask=mask_n, other=0.0).to(tl.float32) - midrise(BITS)
                x_sum = tl.sum(x.to(tl.int32), axis=1).to(tl.float32)
                products -= 2 * zero[:, None] * x_sum[None, :]
            # here and not before the product: registers are short while it runs
            x_scale = tl.load(x_scales_ptr + unit.to(tl.int64) * M + offs_token, mask=offs_token < M, other=0.0)
            acc += products * scale[:, None] * x_scale[None, :]
    out = tl.trans(acc) * 0.5  # levels are doubled
    if bias_ptr is not None:
        out += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    out_ptrs = out_ptr + offs_m * N + offs_n[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=(offs_m < M) & mask_n[None, :])


def launch_config(architecture: str, bits: int, unit: int) -> dict[str, int]:
    """Shape of a program and compiler options.

    Args:
        architecture: of the GPU (gpu.py).
        bits: bits per code.
        unit: columns that share a scale, 32, 64 or 128.
    """
    nearest = nearest_capability(architecture)
    config = LAUNCHES[nearest] | TIGHT.get((nearest, bits, unit), {})
    return config | {"num_stages": config["STAGES"]}


def int8_linear(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y = W′ x + bias for rotated int8 tokens; arguments and result as `tiles.int8_linear`."""
    rows, in_features = x.shape
    gpu = gpu_of(x)
    group_size = in_features // scales.shape[0]
    bits, unit = tile_bits(tiles), unit_of(group_size)
    config = launch_config(gpu.architecture, bits, unit)
    out = torch.empty(rows, out_features, dtype=dtype, device=x.device)
    grid = triton.cdiv(tiles.shape[0], config["TILES"]), triton.cdiv(rows, config["BLOCK_M"])
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _gemm_int8_kernel[grid](
            x,
            x_scales,
            tiles,
            scales,
            zeros,
            bias,
            out,
            rows,
            in_features,
            out_features,
            BITS=bits,
            UNIT=unit,
            UNITS_PER_GROUP=group_size // unit,
            **config,
            PDL=gpu.pdl,
            **gpu.options,
        )
    return out
