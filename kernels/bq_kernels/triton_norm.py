"""RMSNorm and the rotation behind it as one launch, for a packed linear that reads what a norm writes.

    t = x + residual,  h = γ · t / √(mean t² + ε),  Q h

A program that holds a part of a row does not know the row's mean. So every program reads the whole row for it, from the
L2 cache, and writes its own part only. With more rows than FUSED_ROWS these reads should cost more than a launch: the
norm then is one of its own, by the same kernel without a rotation.

h is not rounded before it is rotated. vLLM's own norm rounds it twice, to γ's dtype and to that of x: where both have
the unit roundoff u, the two ways differ by at most 2u·‖h‖ in a rotation block, and then by a rounding each.

No GPU has timed it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .gpu import gpu_of
from .triton_rotate import (
    FEW_ROWS,
    MAX_WARPS,
    THREAD_ELEMENTS,
    TILE_ELEMENTS,
    butterfly,
    launch_configs,
    mix_runs,
    rotation_pass,
)

# 64 rows of 8,192 are two programs per multiprocessor of an H100. They read 0.2 MB there, rows and tables: about 2 µs
# at 64 bytes per clock, as long as a launch
FUSED_ROWS = 64
WIDEST_NORM = 8192  # columns per program without a rotation
READ_PER_THREAD = 8  # columns of a row that a thread loads at a time for the mean: 16 bytes


@triton.jit
def _load_sum(x_ptr, residual_ptr, offs, mask):
    """x + residual in float32; x where `residual_ptr` is None."""
    total = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        total += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _inverse_rms(x_ptr, residual_ptr, row, K, epsilon, WIDTH: tl.constexpr):
    """1 / √(mean t² + ε) of a row, WIDTH columns at a time."""
    squares = tl.zeros([WIDTH], tl.float32)
    for start in tl.range(0, K, WIDTH, loop_unroll_factor=4):  # loads of several turns are under way together
        offs_k = start + tl.arange(0, WIDTH)
        total = _load_sum(x_ptr, residual_ptr, row + offs_k, offs_k < K)
        squares += total * total
    return tl.rsqrt(tl.sum(squares, axis=0) / K + epsilon)


@triton.jit
def normalize(
    x_ptr, residual_ptr, weight_ptr, total_ptr, epsilon, row, offs_k, mask, K, writes, WIDTH: tl.constexpr = 1024
):
    """Columns `offs_k` of h of one row in float32; writes t there where `writes`, if there is a residual.

    Args:
        x_ptr, residual_ptr, total_ptr: [M, K], contiguous; the last two are None without a residual.
        weight_ptr: γ.
        row: where the row begins.
        mask: columns that there are; h is 0 elsewhere.
        WIDTH: columns of the row that are read at a time for its mean.
    """
    inverse = _inverse_rms(x_ptr, residual_ptr, row, K, epsilon, WIDTH)
    weight = tl.load(weight_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)
    total = _load_sum(x_ptr, residual_ptr, row + offs_k, mask)
    if residual_ptr is not None:  # noqa: SIM102  decided when it compiles, the other when it runs
        if writes:
            tl.store(total_ptr + row + offs_k, total.to(total_ptr.dtype.element_ty), mask=mask)
    return total * inverse * weight


@triton.jit
def _norm_kernel(
    x_ptr,
    residual_ptr,  # or None
    weight_ptr,
    total_ptr,
    epsilon,
    cos_sin_ptr,
    mix_ptr,
    out_ptr,
    K,
    LAYERS: tl.constexpr,  # k of the rotation
    RUNS: tl.constexpr,  # m
    NUM_LAYERS: tl.constexpr,  # applied; after the last one come the rotations across runs
    CHUNK: tl.constexpr,  # columns per program: blocks, or a part of one
    WIDTH: tl.constexpr,  # the next power of two
    READ: tl.constexpr,  # columns of the row that it reads at a time
    PDL: tl.constexpr,
):
    BLOCK_SIZE: tl.constexpr = RUNS << LAYERS
    chunks = tl.cdiv(K, CHUNK)
    pid = tl.program_id(0)
    start_k = pid % chunks * CHUNK
    row = (pid // chunks).to(tl.int64) * K
    position = tl.arange(0, WIDTH)
    offs_k = start_k + position
    mask = (position < CHUNK) & (offs_k < K)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    pointers = x_ptr, residual_ptr, weight_ptr, total_ptr
    y = normalize(*pointers, epsilon, row, offs_k, mask, K, True, READ)[None, :]
    if NUM_LAYERS > 0:
        table_ptr = cos_sin_ptr + start_k // BLOCK_SIZE * (LAYERS * BLOCK_SIZE) + start_k % BLOCK_SIZE // 2
        num_pairs = tl.minimum(CHUNK, K - start_k) // 2
        y = butterfly(y, table_ptr, num_pairs, LAYERS, BLOCK_SIZE, 0, NUM_LAYERS, 1)
    if RUNS > 1 and NUM_LAYERS == LAYERS:
        y = mix_runs(y, mix_ptr + start_k // BLOCK_SIZE * (RUNS * RUNS), RUNS, CHUNK // RUNS)
    tl.store(out_ptr + row + offs_k, tl.reshape(y, [WIDTH]).to(out_ptr.dtype.element_ty), mask=mask)


def launch_config(features: int, rotation: dict[str, int] | None) -> dict[str, int]:
    """Compile-time arguments and compiler options.

    Args:
        features: K.
        rotation: the first of `triton_rotate.launch_configs`; None for no rotation.
    """
    row = triton.next_power_of_2(features)
    if rotation is None:
        shape = {"LAYERS": 0, "RUNS": 1, "NUM_LAYERS": 0}
        chunk = width = min(row, WIDEST_NORM)
    else:
        shape = {name: rotation[name] for name in ("LAYERS", "RUNS", "NUM_LAYERS")}
        chunk, width = rotation["HEIGHT"], rotation["PADDED_HEIGHT"]
        one_block = shape["RUNS"] << shape["LAYERS"] == features
        if shape["RUNS"] == 1 or (one_block and shape["NUM_LAYERS"] < shape["LAYERS"]):
            chunk = width = max(width, min(row, TILE_ELEMENTS))  # wide, so that few programs read the row
    warps = min(max(width // (32 * THREAD_ELEMENTS), 1), MAX_WARPS)
    return shape | {"CHUNK": chunk, "WIDTH": width, "READ": warps * 32 * READ_PER_THREAD, "num_warps": warps}


class Norm(NamedTuple):
    """An RMSNorm of rows, as kernels take it: pointers, None where there is none.

    Attributes:
        residual: [M, K], contiguous; None without one.
        weight: γ [K]; None for no norm.
        total: [M, K], to write t into; None without a residual.
        epsilon: ε.
    """

    residual: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    total: torch.Tensor | None = None
    epsilon: float | None = None


NO_NORM = Norm()


def norm_of(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float) -> Norm:
    """The norm of x + residual, with room for the sum; x [M, K], the residual of as many elements."""
    if residual is None:
        return Norm(None, weight.contiguous(), None, epsilon)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return Norm(residual.reshape(x.shape).contiguous(), weight.contiguous(), total, epsilon)


def apply_norm(
    x: torch.Tensor, norm: Norm, cos_sin: torch.Tensor | None = None, mix: torch.Tensor | None = None
) -> torch.Tensor:
    """Q h in the dtype of x [M, K], contiguous; writes t into `norm.total`. Tables as in `rms_norm`."""
    x, out = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
    (rows, features), gpu, passes = x.shape, gpu_of(x), []
    if cos_sin is not None:  # wide blocks in two passes, however many rows: a whole one beside γ and t is too much
        passes = launch_configs(min(rows, FEW_ROWS), mix.shape[-1] << cos_sin.shape[2])
    config = launch_config(features, passes[0] if passes else None)
    target = torch.empty_like(out, dtype=torch.float32) if len(passes) > 1 else out
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _norm_kernel[(rows * triton.cdiv(features, config["CHUNK"]),)](
            x,
            *norm,
            cos_sin.contiguous() if config["NUM_LAYERS"] else None,
            mix.contiguous() if config["RUNS"] > 1 else None,
            target,
            features,
            **config,
            PDL=gpu.pdl,
            **gpu.options,
        )
    if len(passes) > 1:
        rotation_pass(target, cos_sin, mix, out, passes[1], gpu)
    return out


def rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    epsilon: float,
    cos_sin: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Q h and t; arguments and results as `reference.rms_norm`, whose h is not rounded here before it is rotated.

    Args:
        cos_sin, mix: tables of Q from `reference.givens_tables`; None for h itself.
    """
    rows = x.reshape(-1, x.shape[-1])
    norm = norm_of(rows, residual, weight, epsilon)
    out = apply_norm(rows, norm, cos_sin, mix) if x.numel() else torch.empty_like(rows)
    return out.view(x.shape), None if residual is None else norm.total.view(x.shape)
