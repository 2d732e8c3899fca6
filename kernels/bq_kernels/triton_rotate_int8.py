"""Rotation, absmax and rounding of activations to int8 as one Triton kernel: no 16-bit Q x is written in between.

    y = Q x,  scale = max |y| / 127,  int8 = round(y / scale)    per token and unit of columns, float32 inside

A program takes whole rotation blocks and whole units of a few tokens and keeps them in registers. No GPU has timed it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activations import LARGEST_INT8 as _LARGEST_INT8
from .gpu import gpu_of
from .triton_rotate import (
    MAX_WARPS,
    THREAD_ELEMENTS,
    TILE_ELEMENTS,
    WIDEST_TILE,
    apply_rotation,
    butterfly,
    mix_runs,
)

LARGEST_INT8 = tl.constexpr(_LARGEST_INT8)
TO_NEAREST = tl.constexpr(1.5 * 2**23)  # added and subtracted, it rounds a float32 to the nearest integer, ties to even


@triton.jit
def _rotate_to_int8_kernel(
    x_ptr,
    cos_sin_ptr,
    mix_ptr,
    out_ptr,
    out_scales_ptr,
    M,
    stride_xm,
    K,
    LAYERS: tl.constexpr,  # k of the rotation
    RUNS: tl.constexpr,  # m
    UNIT: tl.constexpr,  # columns that share a scale
    CHUNK: tl.constexpr,  # columns per program
    WIDTH: tl.constexpr,  # the next power of two
    BLOCK_M: tl.constexpr,  # tokens per program
    PDL: tl.constexpr,
):
    UNITS: tl.constexpr = WIDTH // UNIT
    chunks = K // CHUNK
    pid = tl.program_id(0)
    pid_k = pid % chunks
    offs_m = (pid // chunks).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    position = tl.arange(0, WIDTH)[None, :]
    offs_k = pid_k * CHUNK + position
    mask = (position < CHUNK) & (offs_m < M)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    y = tl.load(x_ptr + offs_m * stride_xm + offs_k, mask=mask, other=0.0).to(tl.float32)
    if LAYERS > 0:
        y = butterfly(y, cos_sin_ptr + pid_k * (CHUNK * LAYERS), CHUNK // 2, LAYERS, RUNS << LAYERS, 0, LAYERS, 1)
    if RUNS > 1:
        y = mix_runs(y, mix_ptr + pid_k * (RUNS * RUNS), RUNS, 1 << LAYERS)

    y = tl.reshape(y, [BLOCK_M, UNITS, UNIT])
    # a NaN counts as infinity, since a maximum may pass over it
    largest = tl.max(tl.where(y == y, tl.abs(y), float("inf")), axis=2)
    inverse = tl.where(largest > 0, LARGEST_INT8 / largest, 0.0)
    codes = tl.reshape((y * inverse[:, :, None] + TO_NEAREST) - TO_NEAREST, [BLOCK_M, WIDTH])
    tl.store(out_ptr + offs_m * K + offs_k, codes.to(tl.int32).to(tl.int8), mask=mask)
    unit = tl.arange(0, UNITS)[None, :]
    scale_ptrs = out_scales_ptr + (pid_k * (CHUNK // UNIT) + unit).to(tl.int64) * M + offs_m
    tl.store(scale_ptrs, largest / LARGEST_INT8, mask=(unit < CHUNK // UNIT) & (offs_m < M))


def launch_config(rows: int, layers: int, runs: int, unit: int) -> dict[str, int]:
    """Compile-time arguments and compiler options.

    Args:
        rows: M.
        layers, runs: k and m of rotation blocks of 2ᵏ·m features; 0 and 1 for no rotation.
        unit: columns that share a scale, a power of two; with m > 1 at most 2ᵏ.
    """
    chunk = max(runs << layers, unit)
    width = triton.next_power_of_2(chunk)
    # a program of 16 warps spills 8 bytes per thread of 13824 and 14336 features: 8 warps have the registers
    most_warps = MAX_WARPS if runs == 1 or width < WIDEST_TILE else MAX_WARPS // 2
    block_m = max(min(triton.next_power_of_2(rows), TILE_ELEMENTS // width), 1)
    return {
        "LAYERS": layers,
        "RUNS": runs,
        "UNIT": unit,
        "CHUNK": chunk,
        "WIDTH": width,
        "BLOCK_M": block_m,
        "num_warps": min(max(width * block_m // (32 * THREAD_ELEMENTS), 1), most_warps),
    }


def rotate_to_int8(
    x: torch.Tensor, cos_sin: torch.Tensor | None, mix: torch.Tensor | None, unit: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate tokens and round them to int8; arguments and results as `activations.rotate_to_int8`."""
    if cos_sin is not None:
        run, block_size = 1 << cos_sin.shape[2], mix.shape[-1] << cos_sin.shape[2]
        # blocks that end inside a unit (their size is not a power of two, and no tile of registers holds several), and
        # those that no tile holds whole
        if block_size > WIDEST_TILE or (run < block_size and unit > run):
            x, cos_sin = apply_rotation(x.float(), cos_sin, mix), None
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, features = x.shape
    layers, runs = (0, 1) if cos_sin is None else (cos_sin.shape[2], mix.shape[-1])
    out = torch.empty(rows, features, dtype=torch.int8, device=x.device)
    scales = torch.empty(features // unit, rows, dtype=torch.float32, device=x.device)
    config, gpu = launch_config(rows, layers, runs, unit), gpu_of(x)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _rotate_to_int8_kernel[(triton.cdiv(rows, config["BLOCK_M"]) * (features // config["CHUNK"]),)](
            x,
            cos_sin.contiguous() if layers else None,
            mix.contiguous() if runs > 1 else None,
            out,
            scales,
            rows,
            x.stride(0),
            features,
            **config,
            PDL=gpu.pdl,
            **gpu.options,
        )
    return out, scales
