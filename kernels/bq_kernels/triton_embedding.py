"""The look-up of an embedding's rows: a program gathers the codes of a few tokens, dequantizes and rotates them back.

Rows come from the tiles that the LM head multiplies with (tiles.py), so that one copy serves a tied model. A row is 64
bytes of every tile at 2 bits, half of them its own: the other half is the price of that layout. No GPU has timed it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .format import split_block
from .gpu import gpu_of
from .tiles import TILE_K as _TILE_K
from .tiles import tile_bits
from .triton_rotate import butterfly, mix_runs, single_pass_config
from .triton_unpack import gather_codes, midrise


@triton.jit
def _embedding_kernel(
    ids_ptr,
    tiles_ptr,
    scales_ptr,
    zeros_ptr,  # None: mid-rise levels
    cos_sin_ptr,  # None: no rotation
    mix_ptr,
    out_ptr,
    M,
    K,
    stride_sg,  # of scales and zeros, from group to group; rows of all tiles
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    LAYERS: tl.constexpr,  # k of the rotation
    RUNS: tl.constexpr,  # m
    COLUMNS: tl.constexpr,  # per program: whole rotation blocks
    WIDTH: tl.constexpr,  # COLUMNS, or the next power of two
    BLOCK_M: tl.constexpr,  # tokens per program
    PDL: tl.constexpr,
):
    pid_k = tl.program_id(1)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    position = tl.arange(0, WIDTH)[None, :]
    offs_k = pid_k * COLUMNS + position
    mask = (position < COLUMNS) & (offs_k < K) & (offs_m < M)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    offs_n = tl.load(ids_ptr + offs_m, mask=offs_m < M, other=0).to(tl.int64)
    is_row = (offs_n >= 0) & (offs_n < stride_sg)
    weight = gather_codes(tiles_ptr, offs_n, offs_k, K, mask & is_row, BITS).to(tl.float32)
    offs_sg = offs_k // GROUP * stride_sg + offs_n
    if zeros_ptr is not None:
        weight -= tl.load(zeros_ptr + offs_sg, mask=mask & is_row, other=0.0).to(tl.float32)
    else:
        weight -= midrise(BITS)
    # NaN, and no access outside the weights, for an id that is not a row
    scale = tl.load(scales_ptr + offs_sg, mask=mask & is_row, other=0.0).to(tl.float32)
    weight *= tl.where(is_row, scale, float("nan"))
    if RUNS > 1:
        weight = mix_runs(weight, mix_ptr + pid_k.to(tl.int64) * (RUNS * RUNS), RUNS, 1 << LAYERS, True)
    if LAYERS > 0:
        table_ptr = cos_sin_ptr + pid_k.to(tl.int64) * (LAYERS * COLUMNS)
        num_pairs = tl.minimum(COLUMNS, K - pid_k * COLUMNS) // 2
        weight = butterfly(weight, table_ptr, num_pairs, LAYERS, RUNS << LAYERS, 0, LAYERS, 1, True)
    tl.store(out_ptr + offs_m * K + offs_k, weight.to(out_ptr.dtype.element_ty), mask=mask)


def launch_config(tokens: int, block_size: int) -> dict[str, int]:
    """Compile-time arguments and compiler options of the kernel; a program takes one rotation block, or a tile's width.

    Args:
        tokens: rows to look up, at least one.
        block_size: b = 2ᵏ·m of the rotation, m odd; 1 without one.
    """
    layers, runs = split_block(block_size)
    columns = block_size if runs > 1 else max(block_size, _TILE_K)
    shape = single_pass_config(tokens, columns)
    return {
        "LAYERS": layers,
        "RUNS": runs,
        "COLUMNS": columns,
        "WIDTH": shape["PADDED_HEIGHT"],
        "BLOCK_M": shape["BLOCK_M"],
        "num_warps": shape["num_warps"],
    }


def packed_embedding(
    ids: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    in_features: int,
    dtype: torch.dtype,
    cos_sin: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows of W′ Q, looked up by token; arguments and result as `tiles.tiled_embedding`.

    Float32 inside, rounded once. An id that is not a row gives NaN: a kernel cannot raise.
    """
    flat = ids.reshape(-1)
    out = torch.empty(*ids.shape, in_features, dtype=dtype, device=tiles.device)
    if flat.numel() == 0:
        return out
    block_size = 1 if cos_sin is None else mix.shape[-1] << cos_sin.shape[2]
    config, gpu = launch_config(flat.shape[0], block_size), gpu_of(tiles)
    grid = triton.cdiv(flat.shape[0], config["BLOCK_M"]), triton.cdiv(in_features, config["COLUMNS"])
    with torch.cuda.device_of(tiles):  # Triton launches on the current device
        _embedding_kernel[grid](
            flat.contiguous(),
            tiles,
            scales,
            zeros,
            cos_sin.contiguous() if config["LAYERS"] else None,
            mix.contiguous() if config["RUNS"] > 1 else None,
            out,
            flat.shape[0],
            in_features,
            scales.shape[1],
            BITS=tile_bits(tiles),
            GROUP=in_features // scales.shape[0],
            PDL=gpu.pdl,
            **config,
            **gpu.options,
        )
    return out
