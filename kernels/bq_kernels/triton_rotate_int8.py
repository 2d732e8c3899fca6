"""Rotation, absmax and rounding of activations to int8 as one Triton kernel: no 16-bit Q x is written in between.

    y = Q x,  scale = max |y| / 127,  int8 = round(y / scale)    per token, float32 inside

A program takes whole tokens. Up to 16,384 features stay in registers. Of more, and where rotation blocks are not a
power of two, it takes a chunk at a time and rotates each twice: for the largest magnitude, then to round. No GPU has
timed it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .activations import LARGEST_INT8 as _LARGEST_INT8
from .gpu import gpu_of
from .triton_rotate import MAX_WARPS, THREAD_ELEMENTS, TILE_ELEMENTS, butterfly, mix_runs

LARGEST_INT8 = tl.constexpr(_LARGEST_INT8)
TO_NEAREST = tl.constexpr(1.5 * 2**23)  # added and subtracted, it rounds a float32 to the nearest integer, ties to even
MOST_COLUMNS = 16384  # of a token in registers: 32 per thread


@triton.jit
def _rotated_chunk(
    x_ptr,
    cos_sin_ptr,
    mix_ptr,
    offs_m,
    M,
    stride_xm,
    K,
    chunk,
    LAYERS: tl.constexpr,
    RUNS: tl.constexpr,
    CHUNK: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Columns of one chunk, rotated: float32 [rows, WIDTH], 0 beyond the chunk and beyond x."""
    start_k = chunk * CHUNK
    position = tl.arange(0, WIDTH)[None, :]
    mask = (position < CHUNK) & (start_k + position < K) & (offs_m < M)
    y = tl.load(x_ptr + offs_m * stride_xm + (start_k + position), mask=mask, other=0.0).to(tl.float32)
    if LAYERS > 0:
        num_pairs = tl.minimum(CHUNK, K - start_k) // 2
        y = butterfly(y, cos_sin_ptr + start_k * LAYERS, num_pairs, LAYERS, RUNS << LAYERS, 0, LAYERS, 1)
    if RUNS > 1:
        y = mix_runs(y, mix_ptr + chunk * (RUNS * RUNS), RUNS, 1 << LAYERS)
    return y


@triton.jit
def _largest(y):
    """Largest magnitude per row; a NaN counts as infinity, since a maximum may pass over it."""
    return tl.max(tl.where(y == y, tl.abs(y), float("inf")), axis=1, keep_dims=True)


@triton.jit
def _store_codes(y, out_ptr, offs_m, M, K, chunk, CHUNK: tl.constexpr):
    position = tl.arange(0, y.shape[1])[None, :]
    offs_k = chunk * CHUNK + position
    mask = (position < CHUNK) & (offs_k < K) & (offs_m < M)
    codes = (y + TO_NEAREST) - TO_NEAREST
    tl.store(out_ptr + offs_m * K + offs_k, codes.to(tl.int32).to(tl.int8), mask=mask)


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
    CHUNK: tl.constexpr,  # columns that are rotated together: whole rotation blocks
    WIDTH: tl.constexpr,  # the next power of two
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,  # tokens per program
    PDL: tl.constexpr,
):
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    chunk_args = (x_ptr, cos_sin_ptr, mix_ptr, offs_m, M, stride_xm, K)
    y = _rotated_chunk(*chunk_args, 0, LAYERS, RUNS, CHUNK, WIDTH)
    largest = _largest(y)
    for chunk in tl.range(1, CHUNKS, num_stages=1):
        y = _rotated_chunk(*chunk_args, chunk, LAYERS, RUNS, CHUNK, WIDTH)
        largest = tl.maximum(largest, _largest(y))
    inverse = tl.where(largest > 0, LARGEST_INT8 / largest, 0.0)
    tl.store(out_scales_ptr + offs_m, largest / LARGEST_INT8, mask=offs_m < M)
    # the last chunk is still there
    _store_codes(y * inverse, out_ptr, offs_m, M, K, CHUNKS - 1, CHUNK)
    for chunk in tl.range(0, CHUNKS - 1, num_stages=1):
        y = _rotated_chunk(*chunk_args, chunk, LAYERS, RUNS, CHUNK, WIDTH)
        _store_codes(y * inverse, out_ptr, offs_m, M, K, chunk, CHUNK)


def launch_config(rows: int, features: int, layers: int, runs: int) -> dict[str, int]:
    """Compile-time arguments and compiler options.

    Args:
        rows, features: M and K.
        layers, runs: k and m of rotation blocks of 2ᵏ·m features; 0 and 1 for no rotation.
    """
    block_size = runs << layers
    chunk = block_size if runs > 1 else max(block_size, min(triton.next_power_of_2(features), MOST_COLUMNS))
    width = triton.next_power_of_2(chunk)
    block_m = max(min(triton.next_power_of_2(rows), TILE_ELEMENTS // width), 1)
    return {
        "LAYERS": layers,
        "RUNS": runs,
        "CHUNK": chunk,
        "WIDTH": width,
        "CHUNKS": triton.cdiv(features, chunk),
        "BLOCK_M": block_m,
        "num_warps": min(max(width * block_m // (32 * THREAD_ELEMENTS), 1), MAX_WARPS),
    }


def rotate_to_int8(
    x: torch.Tensor, cos_sin: torch.Tensor | None, mix: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate tokens and round them to int8; arguments and results as `activations.rotate_to_int8`."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    rows, features = x.shape
    layers, runs = (0, 1) if cos_sin is None else (cos_sin.shape[2], mix.shape[-1])
    out = torch.empty(rows, features, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    config, gpu = launch_config(rows, features, layers, runs), gpu_of(x)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _rotate_to_int8_kernel[(triton.cdiv(rows, config["BLOCK_M"]),)](
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
