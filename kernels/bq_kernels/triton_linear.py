"""The packed linear on a GPU: which kernel takes how many rows, and how it is launched.

launch.json holds the best launch per number of rows, by device capability, or by the name of a GPU for which
`benchmarks/kernels.py tune` has filled it in. The lines of `sm90` are the best of a sweep on an H100 80GB HBM3 over
the layers of LLaMA-2-7B and 8192², 2 bits, groups of 128, the rotation in blocks of 128 included. Times are for 8192²:

- One row: the decode kernel rotates x itself in 12.2 µs; with a kernel of its own for the rotation it takes 12.7. Two
  rows: 17.7 and 13.9, for every program repeats the rotation. So it is fused for one row only.
- A slice of 1,024 columns, two programs per multiprocessor, fills the registers and halves the partial sums. It is the
  best at 8192² and 4096 × 11008; 512 columns are better by 0.6 µs of 9.2 for 12288 × 4096, by 0.7 of 5.6 for 4096².
- Sixteen rows: the GEMM kernel takes 16.1 µs, the decode kernel 22.7. With 8 rows that takes 17.8, so GEMM starts at 5.
- At 256 rows the GEMM kernel takes 63 µs (cuBLAS on 16-bit weights: 55), at 1,024 `dense` takes 232 (178).
- Rotating x costs 9 µs for 1,024 rows and 55 µs for 4,096. Folding the rotation into the weights instead (`fuse` of
  `dense`) should cost at most 32 µs, by its count of instructions, in part behind their store. That is a prediction,
  which no GPU has checked: no line folds yet, `tune` times both.

The decode kernel on mma.sync, `mma` (triton_mma.py), has not been timed since it was rebuilt, so no line of the table
names it: `benchmarks/kernels.py tune` tries it beside the others and writes it into the table where it is faster.

Other capabilities get the lines of the nearest entry. Where the matrix instruction keeps its operands in registers
(`mma.sync`: sm80 to sm89, sm120), slices of 1,024 columns and blocks of 128 rows spill; where a program has 64 KiB of
shared memory (AMD), blocks of 128 rows exceed it and blocks of 32 × 128 leave no room for a second program. Those lines
are replaced by ones that fit; no GPU has run them, and their entries say so.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from . import triton_decode, triton_gemm, triton_mma
from .activations import rounds_activations
from .format import GROUP_MULTIPLE
from .gpu import Gpu, gpu_of, nearest_capability
from .tiles import TILE_N, tile_bits, unit_of
from .triton_arrange import fuses, rotate_and_arrange
from .triton_dequantize import dequantize, fits_tile
from .triton_gemm_int8 import int8_linear
from .triton_norm import FUSED_ROWS, NO_NORM, Norm, apply_norm, norm_of
from .triton_rotate import apply_rotation
from .triton_rotate_int8 import rotate_to_int8

LAUNCH_TABLE = Path(__file__).with_name("launch.json")
NOT_MEASURED = ", not measured"  # ends the name of an entry whose lines no GPU has run
STREAMS, COUNTERS = 16, 1 << 15  # streams with counters of their own; programs of one launch that share sums
MOST_DENSE = 1 << 28  # weights that `dense` dequantizes at a time: a part of a large LM head's


@dataclass(frozen=True)
class Launch:
    """One line of launch.json.

    Attributes:
        max_rows: largest number of rows of x that it is for; None for any number.
        kernel: `decode`, `mma`, `gemm`, or `dense` (dequantize, then the vendor's product); `decode` and `mma` are for
            up to 16 rows.
        programs: decode, gemm: programs per multiprocessor; K is split until there are as many. mma: see
            triton_mma.launch_config.
        slice: decode: columns that a program keeps, where its registers hold them.
        fuse: decode: whether the program rotates them itself. dense: whether the rotation is folded into the weights as
            they are dequantized, in place of rotating x.
        block_m, tiles: gemm: see triton_gemm.launch_config.
        stages, warps: gemm and mma: see there and triton_mma.launch_config.
        outputs, exact: mma: see triton_mma.launch_config.
    """

    max_rows: int | None
    kernel: str
    programs: int = 1
    slice: int = 512
    fuse: bool = False
    block_m: int = 128
    tiles: int = 1
    stages: int = 3
    warps: int = 4
    outputs: int = 32
    exact: bool = False


MOST_DECODE_ROWS = 16
WITHOUT_MMA = Launch(MOST_DECODE_ROWS, "decode", 4)  # where a line says `mma` and the GPU has no such instruction


@functools.cache
def launches(name: str, architecture: str) -> tuple[Launch, ...]:
    """Lines for a GPU, fewest rows first: by its name, else its capability, else the nearest capability."""
    table = {key.removesuffix(NOT_MEASURED): lines for key, lines in json.loads(LAUNCH_TABLE.read_text()).items()}
    lines = table.get(name) or table.get(architecture) or table[nearest_capability(architecture)]
    return tuple(Launch(**line) for line in lines)


def choose(gpu: Gpu, rows: int) -> Launch:
    """The line for a number of rows."""
    lines = launches(gpu.name, gpu.architecture)
    return next(line for line in lines if line.max_rows is None or rows <= line.max_rows)


@functools.cache
def _all_counters(device: torch.device) -> torch.Tensor:
    # for all streams at once: memory that outlives a CUDA graph cannot be allocated during its capture
    return torch.zeros(STREAMS, COUNTERS, dtype=torch.int32, device=device)


@functools.cache
def _stream_slot(device: torch.device, stream: int) -> int:
    _stream_slot.used = getattr(_stream_slot, "used", -1) + 1
    return _stream_slot.used % STREAMS


def _counters(device: torch.device) -> torch.Tensor:
    """Counters at 0 for the launches of the current stream; every launch leaves them at 0."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _all_counters(device)[_stream_slot(device, stream)]


def decode_linear(x, tiles, scales, zeros, bias, out_features, cos_sin, norm: Norm, launch: Launch, gpu: Gpu):
    """Launch the decode kernel on x [rows, K], rows ≤ 16; rotates by `cos_sin` unless that is None.

    With one row it first normalizes x, if there is a norm.
    """
    rows, in_features = x.shape
    n_tiles, bits, group_size = tiles.shape[0], tile_bits(tiles), in_features // scales.shape[0]
    rotation_block = 1 if cos_sin is None else 1 << cos_sin.shape[2]
    columns = triton_decode.kept_columns(launch.slice, bits, group_size, zeros is not None)
    config = triton_decode.launch_config(rows, bits, group_size, in_features, rotation_block, columns)
    # Where registers hold only a part of the slice there are more programs, with as many tiles each: on the H100 the
    # best number is 2 for 1,024 columns, 4 for 512 and 8 for 256 (8192², one row)
    wanted_slices = triton.cdiv(in_features, launch.slice)
    ranges = max(min(launch.programs * gpu.multiprocessors // wanted_slices, n_tiles), 1)
    tiles_per_program = triton.cdiv(n_tiles, ranges)
    ranges = triton.cdiv(n_tiles, tiles_per_program)
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
        tiles_per_program,
        *norm,
        **config,
        PDL=gpu.pdl,
        **gpu.options,
    )
    return out


def mma_linear(x, tiles, scales, zeros, bias, out_features, cos_sin, norm: Norm, launch: Launch, gpu: Gpu):
    """Launch the decode kernel on mma.sync on x [rows, K], rows ≤ 16, behind the one that normalizes and arranges x."""
    (rows, in_features), bits, group_size = x.shape, tile_bits(tiles), x.shape[1] // scales.shape[0]
    unit = unit_of(group_size)
    operands, sums = rotate_and_arrange(x, cos_sin, bits, unit, launch.exact, gpu, norm)
    shape = launch.outputs, launch.warps, launch.stages, launch.programs
    config = triton_mma.launch_config(rows, bits, group_size, in_features, zeros is not None, *shape, launch.exact)
    out = x.new_empty(rows, out_features)
    sizes = rows, out_features, tiles.shape[1], in_features // unit, scales.shape[1]
    kernel = triton_mma._mma_kernel[(triton.cdiv(out_features, 16 * config["STRIPS"]),)]
    kernel(operands, sums, tiles, scales, zeros, bias, out, *sizes, **config, PDL=gpu.pdl, **gpu.options)
    return out


def gemm_linear(x, tiles, scales, zeros, bias, out_features, launch: Launch, gpu: Gpu):
    """Launch the GEMM kernel on rotated x [rows, K]."""
    rows, in_features = x.shape
    grid = triton.cdiv(tiles.shape[0], launch.tiles), triton.cdiv(rows, launch.block_m)
    # at least four tiles per program, or the split costs more than it gains
    split_k = max(min(launch.programs * gpu.multiprocessors // (grid[0] * grid[1]), tiles.shape[1] // 4), 1)
    config = triton_gemm.launch_config(
        tile_bits(tiles),
        in_features // scales.shape[0],
        launch.block_m,
        launch.tiles,
        split_k,
        launch.stages,
        launch.warps,
    )
    out = x.new_empty(rows, out_features)
    sums = grid[0] * grid[1] * split_k * launch.tiles * TILE_N * launch.block_m if split_k > 1 else 0
    triton_gemm._gemm_kernel[(*grid, split_k)](
        x,
        tiles,
        scales,
        zeros,
        bias,
        out,
        x.new_empty(sums, dtype=torch.float32),
        _counters(x.device),
        rows,
        x.stride(0),
        in_features,
        out_features,
        **config,
        PDL=gpu.pdl,
        **gpu.options,
    )
    return out


def dense_linear(x, tiles, scales, zeros, bias, out_features, cos_sin=None, mix=None):
    """Dequantize, then the vendor's product on x [rows, K]; the outputs of a large vocabulary part by part."""
    step = max(MOST_DENSE // x.shape[1] // TILE_N, 1) * TILE_N
    out = x.new_empty(len(x), out_features)
    for start in range(0, out_features, step):
        stop = min(start + step, out_features)
        tile_rows = slice(start // TILE_N, triton.cdiv(stop, TILE_N))
        columns = slice(start, tile_rows.stop * TILE_N)
        packed = tiles[tile_rows], scales[:, columns], None if zeros is None else zeros[:, columns]
        weight = dequantize(*packed, x.shape[1], stop - start, x.dtype, cos_sin, mix)
        if bias is None:
            torch.mm(x, weight.T, out=out[:, start:stop])
        else:
            torch.addmm(bias[start:stop].to(x.dtype), x, weight.T, out=out[:, start:stop])
    return out


def folds_rotation(launch: Launch, rows: int, out_features: int, cos_sin: torch.Tensor, mix: torch.Tensor) -> bool:
    """Whether `dense` multiplies x as it is with W′ Q.

    Rotation blocks wider than a tile cost as much per row of W as per row of x: there the side with fewer rows rotates.
    """
    return launch.kernel == "dense" and launch.fuse and (fits_tile(cos_sin, mix) or rows >= out_features)


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
    activation_bits: int = 16,
) -> torch.Tensor:
    """y = W′ (Q x) + bias; arguments and result as `tiles.tiled_linear`.

    Args:
        launch: how to compute it in 16 bits; by default the line of launch.json for this GPU and this many rows.

    Raises:
        ValueError: if groups are not a multiple of 32 columns.

    `decode` and `mma` multiply exactly and add up in float32; `mma` rounds Q x to float16 with an exponent per group
    instead of to the dtype of x (operands.py), and x that is not finite gives NaN. `gemm` rounds a float zero, and
    `dense` all of W′ or W′ Q, to the dtype of x before that.
    """
    rows, layer = x.reshape(-1, x.shape[-1]), (tiles, scales, zeros, bias, out_features, cos_sin, mix)
    return _linear(rows, NO_NORM, *layer, launch, activation_bits).view(*x.shape[:-1], out_features)


def norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    epsilon: float,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    cos_sin: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
    launch: Launch | None = None,
    activation_bits: int = 16,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`packed_linear` behind an RMSNorm; arguments and results as `tiles.norm_linear`.

    Up to FUSED_ROWS rows the norm is in the launch that rotates, else in front of it (triton_norm.py).
    """
    rows, layer = x.reshape(-1, x.shape[-1]), (tiles, scales, zeros, bias, out_features, cos_sin, mix)
    norm = norm_of(rows, residual, norm_weight, epsilon)
    out = _linear(rows, norm, *layer, launch, activation_bits).view(*x.shape[:-1], out_features)
    return out, None if residual is None else norm.total.view(x.shape)


def _rotates_itself(x, scales, bits, zeros, cos_sin, mix, norm: Norm, launch: Launch) -> bool:
    """Whether the first kernel of `decode` or `mma` rotates x, and normalizes it before that if there is a norm."""
    if cos_sin is None or launch.kernel not in ("decode", "mma"):
        return False
    if launch.kernel == "mma":
        return fuses(cos_sin, mix)
    columns = triton_decode.kept_columns(launch.slice, bits, x.shape[1] // scales.shape[0], zeros is not None)
    # rotation blocks that are a power of two and that a program keeps whole
    fits = mix.shape[-1] == 1 and 1 < 1 << cos_sin.shape[2] <= columns
    return launch.fuse and fits and (norm.weight is None or x.shape[0] == 1)


def _linear(x, norm: Norm, tiles, scales, zeros, bias, out_features, cos_sin, mix, launch, activation_bits):
    """`packed_linear` of x [M, K], normalized before if there is a norm."""
    rows, in_features = x.shape
    if rows == 0:
        return x.new_empty(rows, out_features)
    if x.stride(-1) != 1 or norm.weight is not None:
        x = x.contiguous()
    group_size = in_features // scales.shape[0]
    if group_size % GROUP_MULTIPLE:
        raise ValueError(f"the kernels need groups of a multiple of {GROUP_MULTIPLE} columns, not {group_size}")
    gpu = gpu_of(x)
    if rounds_activations(rows, activation_bits) and launch is None:
        x = x if norm.weight is None else apply_norm(x, norm)
        int8 = rotate_to_int8(x, cos_sin, mix, unit_of(group_size))
        return int8_linear(*int8, tiles, scales, zeros, bias, out_features, x.dtype)
    launch = launch or choose(gpu, rows)
    if x.dtype == torch.float32 and x.is_cuda:  # the matrix units do not take it
        launch = Launch(None, "dense")
    if launch.kernel == "mma" and not triton_mma.runs_on(gpu):
        launch = WITHOUT_MMA
    inside = _rotates_itself(x, scales, tile_bits(tiles), zeros, cos_sin, mix, norm, launch)
    folds = cos_sin is not None and folds_rotation(launch, rows, out_features, cos_sin, mix)
    in_front = cos_sin is not None and not inside and not folds
    if norm.weight is not None and not inside:
        together = in_front and rows <= FUSED_ROWS
        x, norm = apply_norm(x, norm, *((cos_sin, mix) if together else ())), NO_NORM
        in_front = in_front and not together
    if in_front:
        x = apply_rotation(x, cos_sin, mix)
    packed = (x, tiles, scales, zeros, bias, out_features)
    with torch.cuda.device_of(x):  # Triton launches on the current device
        if launch.kernel == "decode":
            return decode_linear(*packed, cos_sin if inside else None, norm, launch, gpu)
        if launch.kernel == "mma":
            return mma_linear(*packed, cos_sin if inside else None, norm, launch, gpu)
        if launch.kernel == "gemm":
            return gemm_linear(*packed, launch, gpu)
        return dense_linear(*packed, *((cos_sin, mix) if folds else (None, None)))
