"""The packed linear on a GPU: which kernel takes how many rows, and how it is launched.

`launch.json` holds the choice by the name of a GPU, where benchmarks/kernels.py has measured it, else by architecture,
else `default`.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import triton

from . import triton_decode, triton_gemm
from .format import GROUP_MULTIPLE
from .gpu import Gpu, gpu_of
from .tiles import ROWS, WORDS
from .triton_dequantize import dequantize
from .triton_rotate import apply_rotation

STREAMS, COUNTERS = 16, 1 << 15  # programs that one launch may let wait for each other


@dataclass(frozen=True)
class Launch:
    """One line of launch.json.

    Attributes:
        rows: most rows of x that it is for; None for any number.
        kernel: `decode`, `gemm`, or `dense` (dequantize, then the vendor's product).
        programs: programs that are to share a multiprocessor; K is split until there are as many.
        slice: decode: columns that a program keeps, where its registers hold them.
        fuse: decode: whether the program rotates them itself.
        block_m, tiles, stages, warps: gemm: see triton_gemm.launch_config.
    """

    rows: int | None
    kernel: str
    programs: int = 1
    slice: int = 512
    fuse: bool = False
    block_m: int = 128
    tiles: int = 1
    stages: int = 3
    warps: int = 4


@functools.cache
def launches(name: str, architecture: str) -> tuple[Launch, ...]:
    """Lines for a GPU, fewest rows first."""
    table = json.loads(Path(__file__).with_name("launch.json").read_text())
    lines = table.get(name) or table.get(architecture) or table["default"]
    return tuple(Launch(**line) for line in lines)


def choose(gpu: Gpu, rows: int) -> Launch:
    """The line for a number of rows."""
    lines = launches(gpu.name, gpu.architecture)
    return next(launch for launch in lines if launch.rows is None or rows <= launch.rows)


@functools.cache
def _all_counters(device: torch.device) -> torch.Tensor:
    # all at once, for within the capture of a CUDA graph is no time to allocate what outlives it
    return torch.zeros(STREAMS, COUNTERS, dtype=torch.int32, device=device)


@functools.cache
def _stream_slot(device: torch.device, stream: int) -> int:
    _stream_slot.used = getattr(_stream_slot, "used", -1) + 1
    return _stream_slot.used % STREAMS


def _counters(device: torch.device) -> torch.Tensor:
    """Counters at 0 for the launches of the current stream; every launch leaves them at 0."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _all_counters(device)[_stream_slot(device, stream)]


def decode_linear(x, tiles, scales, zeros, bias, out_features, cos_sin, launch: Launch, gpu: Gpu):
    """Launch the decode kernel on x [rows, K], rows ≤ 16; rotates by `cos_sin` unless that is None."""
    rows, in_features = x.shape
    block = 1 if cos_sin is None else 1 << cos_sin.shape[2]
    group = in_features // scales.shape[0]
    columns = triton_decode.columns_kept(launch.slice, group, zeros is not None)
    config = triton_decode.launch_config(rows, tiles.shape[2] // WORDS, group, in_features, block, columns)
    ranges = max(min(launch.programs * gpu.multiprocessors // config["SLICES"], tiles.shape[0]), 1)
    each = triton.cdiv(tiles.shape[0], ranges)
    ranges = triton.cdiv(tiles.shape[0], each)
    out = x.new_empty(rows, out_features)
    partial = x.new_empty(config["SLICES"] * rows * scales.shape[1], dtype=torch.float32)
    triton_decode._decode_kernel[config["SLICES"], ranges](
        x,
        cos_sin,
        tiles,
        scales,
        zeros,
        bias,
        out,
        partial,
        _counters(x.device),
        rows,
        x.stride(0),
        in_features,
        out_features,
        each,
        **config,
        PDL=gpu.early_launch,
        **gpu.options,
    )
    return out


def gemm_linear(x, tiles, scales, zeros, bias, out_features, launch: Launch, gpu: Gpu):
    """Launch the GEMM kernel on rotated x [rows, K]."""
    rows, in_features = x.shape
    blocks = triton.cdiv(tiles.shape[0], launch.tiles), triton.cdiv(rows, launch.block_m)
    # at least four tiles a program, or the split costs more than it brings
    split = max(min(launch.programs * gpu.multiprocessors // (blocks[0] * blocks[1]), tiles.shape[1] // 4), 1)
    config = triton_gemm.launch_config(
        tiles.shape[2] // WORDS,
        in_features // scales.shape[0],
        launch.block_m,
        launch.tiles,
        split,
        launch.stages,
        launch.warps,
    )
    out = x.new_empty(rows, out_features)
    cells = blocks[0] * blocks[1] * split * launch.tiles * ROWS * launch.block_m if split > 1 else 0
    triton_gemm._gemm_kernel[(*blocks, split)](
        x,
        tiles,
        scales,
        zeros,
        bias,
        out,
        x.new_empty(cells, dtype=torch.float32),
        _counters(x.device),
        rows,
        x.stride(0),
        in_features,
        out_features,
        **config,
        PDL=gpu.early_launch,
        **gpu.options,
    )
    return out


def packed_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    cos_sin: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
    launch: Launch | None = None,
) -> torch.Tensor:
    """y = W′ (Q x) + bias; arguments and result as `tiles.tiled_linear`.

    Args:
        launch: how to compute it; by default what launch.json says for this GPU and this many rows.

    Raises:
        ValueError: if groups are not a multiple of 32 columns.

    `decode` multiplies exactly and adds up in float32. Before that, `gemm` rounds a float zero, and `dense` all of W′,
    to the dtype of x.
    """
    in_features = x.shape[-1]
    shape = (*x.shape[:-1], out_features)
    x = x.reshape(-1, in_features)
    if x.shape[0] == 0:
        return x.new_empty(shape)
    if x.stride(-1) != 1:
        x = x.contiguous()
    group = in_features // scales.shape[0]
    if group % GROUP_MULTIPLE:
        raise ValueError(f"the kernels need groups of a multiple of {GROUP_MULTIPLE} columns, not {group}")
    gpu = gpu_of(x)
    launch = launch or choose(gpu, x.shape[0])
    if x.dtype == torch.float32 and x.is_cuda:  # not what the matrix units take
        launch = Launch(None, "dense")
    fused = False
    if launch.kernel == "decode" and launch.fuse and cos_sin is not None:
        columns = triton_decode.columns_kept(launch.slice, group, zeros is not None)
        # blocks that are a power of two and that a program keeps whole
        fused = mix.shape[-1] == 1 and 1 < 1 << cos_sin.shape[2] <= columns
    if cos_sin is not None and not fused:
        x = apply_rotation(x, cos_sin, mix)
    packed = (x, tiles, scales, zeros, bias, out_features)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if launch.kernel == "decode":
            out = decode_linear(*packed, cos_sin if fused else None, launch, gpu)
        elif launch.kernel == "gemm":
            out = gemm_linear(*packed, launch, gpu)
        else:
            weight = dequantize(tiles, scales, zeros, in_features, out_features, x.dtype)
            out = F.linear(x, weight, None if bias is None else bias.to(x.dtype))
    return out.view(shape)
