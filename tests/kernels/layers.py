"""Random layers for the tests of kernels, their values in float64, and how far float32 may be off."""

import math

import torch
from bq_kernels import ops, reference, triton_linear
from bq_kernels.format import midrise_zero, num_angles
from bq_kernels.packing import pack
from bq_kernels.tiles import tile
from bq_kernels.triton_linear import Launch

HALF, BRAIN, FLOAT = torch.float16, torch.bfloat16, torch.float32


def assert_within(got, want, bound):
    """`got` is float64 `want`, off by at most `bound` in float32 arithmetic and then rounded once to its dtype."""
    info = torch.finfo(got.dtype)
    limit = bound + info.eps / 2 * (want.abs() + bound) + info.smallest_normal * info.eps
    excess = ((got.double() - want).abs() - limit).flatten()
    worst = int(excess.argmax())
    assert excess[worst] <= 0, f"{got.flatten()[worst]} for {want.flatten()[worst]}, allowed ±{limit.flatten()[worst]}"


def random_tables(blocks, block_size):
    angles = (torch.rand(blocks, num_angles(block_size)) * 2 - 1) * math.pi
    return reference.givens_tables(angles, block_size)


def random_layer(out_features, in_features, bits, group, float_zero, scale=1.0):
    """Codes [N, K], and what the kernels take: tiles, scales and zeros."""
    codes = torch.randint(2**bits, (out_features, in_features))
    scales = (torch.rand(out_features, in_features // group) * scale).half()
    zeros = (torch.rand(out_features, in_features // group) * (2**bits - 1)).half() if float_zero else None
    return codes, scales, zeros, tile(pack(codes, bits), scales, zeros, in_features)


def exact_levels(scales, zeros, in_features, bits):
    """Step and zero of every weight in float64, [..., N, K]: W′ is step · (codes − zero)."""
    step = scales.double().repeat_interleave(in_features // scales.shape[-1], dim=-1)
    if zeros is None:
        return step, torch.full_like(step, midrise_zero(bits))
    return step, zeros.double().repeat_interleave(in_features // scales.shape[-1], dim=-1)


def strided(features, dtype):
    """Inputs [..., features] that are not contiguous."""
    wide = torch.randn(6, 3 * features).to(dtype)
    yield wide[:, features : 2 * features]  # a slice of a fused projection: one row stride
    yield wide[::2, :features]
    yield wide[1:].flip(0)[:, -features:]
    yield torch.randn(2, 3, features).to(dtype).transpose(0, 1)  # rows without a common stride
    yield torch.randn(features, 5).to(dtype).T  # the last dimension is not contiguous
    yield torch.randn(1, features).to(dtype).expand(3, features)  # stride 0
    yield torch.randn(4, 2 * features).to(dtype)[:, ::2]


def linear(x, *arguments):
    """The launcher, with a choice of launch that the operator does not have."""
    if ops.interpreted():
        return ops._interpret(triton_linear.packed_linear, x, *arguments)
    return triton_linear.packed_linear(x, *arguments)


def decode(slice_columns=256, fuse=True, programs=8):
    return Launch(None, "decode", programs, slice_columns, fuse)


def gemm(block_m=16, tiles=1, programs=1):
    return Launch(None, "gemm", programs, block_m=block_m, tiles=tiles)
