"""The packed linear as one Triton kernel: codes are unpacked in registers and multiplied on the matrix units."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .format import GROUP_MULTIPLE
from .reference import layout_of


@triton.jit
def _load_codes(words, mask, BITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """BLOCK_K codes of every row as int32 [BLOCK_N, BLOCK_K]; `words` [BLOCK_N, 1] points at their first words."""
    if BITS == 3:  # 32 codes in three words, two of them astride
        first = words + tl.arange(0, BLOCK_K // 32)[None, :] * 3
        word_0 = tl.load(first, mask=mask, other=0).to(tl.uint32, bitcast=True)[:, :, None]
        word_1 = tl.load(first + 1, mask=mask, other=0).to(tl.uint32, bitcast=True)[:, :, None]
        word_2 = tl.load(first + 2, mask=mask, other=0).to(tl.uint32, bitcast=True)[:, :, None]
        bit = tl.arange(0, 32)[None, None, :] * 3
        low = tl.where(bit < 32, word_0, tl.where(bit < 64, word_1, word_2))
        high = tl.where(bit < 30, word_0, tl.where(bit < 62, word_1, word_2))  # holds the code's last bit
        shift = (bit % 32).to(tl.uint32)
        # two shifts, since one by 32 is undefined; what `high` adds to a code that is whole lies above its bits
        codes = ((low >> shift) | ((high << 1) << (31 - shift))).to(tl.int32, bitcast=True)
    else:
        word = tl.load(words + tl.arange(0, BLOCK_K * BITS // 32)[None, :], mask=mask, other=0)
        codes = word[:, :, None] >> (tl.arange(0, 32 // BITS) * BITS)[None, None, :]
    return tl.reshape(codes, [BLOCK_N, BLOCK_K]) & ((1 << BITS) - 1)


@triton.jit
def _linear_kernel(
    x,
    qweight,
    scales,
    zeros,  # None: mid-rise levels
    bias,  # or None
    out,
    rows,
    x_stride,
    in_features,
    out_features,
    BITS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,  # divides GROUP, so one scale holds for a whole step
):
    # 64 bits: rows × features may pass 2³¹
    row = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = row < rows
    column_mask = column < out_features
    inputs = x + row[:, None] * x_stride + tl.arange(0, BLOCK_K)[None, :]
    words = qweight + column[:, None] * (in_features // 32 * BITS)
    groups = column * (in_features // GROUP)

    acc = tl.full([BLOCK_M, BLOCK_N], 0.0, tl.float32)
    for start in range(0, in_features, BLOCK_K):
        tile = tl.load(inputs + start, mask=row_mask[:, None], other=0.0)
        codes = _load_codes(words + start // 32 * BITS, column_mask[:, None], BITS, BLOCK_N, BLOCK_K).to(tl.float32)
        scale = tl.load(scales + groups + start // GROUP, mask=column_mask, other=0.0).to(tl.float32)
        if zeros is None:  # q − z is a multiple of 1/2 below 8, exact in every dtype
            levels = (codes - ((1 << BITS) - 1) / 2).to(tile.dtype)
            product = tl.dot(tile, tl.trans(levels), input_precision="ieee")
        else:  # q is exact, q − z is not: z multiplies the sum of the inputs instead
            zero = tl.load(zeros + groups + start // GROUP, mask=column_mask, other=0.0).to(tl.float32)
            product = tl.dot(tile, tl.trans(codes.to(tile.dtype)), input_precision="ieee")
            product -= tl.sum(tile.to(tl.float32), axis=1)[:, None] * zero[None, :]
        acc += product * scale[None, :]
    if bias is not None:
        acc += tl.load(bias + column, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    target = out + row[:, None] * out_features + column[None, :]
    tl.store(target, acc.to(out.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def launch_config(rows: int, bits: int, group: int, dtype: torch.dtype) -> dict[str, int]:
    """Compile-time arguments and compiler options of the packed linear kernel.

    Args:
        rows: rows of x, at least one.
        bits: bits per code.
        group: columns that share a scale.
        dtype: of x.

    Raises:
        ValueError: if the groups do not fill whole words.
    """
    if group % GROUP_MULTIPLE:
        raise ValueError(f"the kernel needs groups of a multiple of {GROUP_MULTIPLE} columns, not {group}")
    if dtype.itemsize > 2:  # no matrix unit takes it: threads hold whole rows of the operands, which have to be small
        block_m, block_n, depth = 16, 32, 32
    else:
        block_m = min(max(triton.next_power_of_2(rows), 16), 64)
        block_n, depth = (32, 128) if block_m == 16 else (64, 64)
    return {
        "BITS": bits,
        "GROUP": group,
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": min(group & -group, depth),
        "num_warps": max(block_m * block_n // 512, 4),  # 16 sums a thread: with 32, 3 bits and a float zero spill
        "enable_fp_fusion": True,  # Triton 3.10 turns it off by default
    }


def packed_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = W′ x + bias with packed weights and input that is already rotated; float32 accumulation.

    Args:
        x: [..., K], any float dtype. Read in place where the leading dimensions collapse to one stride.
        qweight: int32 [N, K·bits/32].
        scales: float16 [N, K/group], group a multiple of 32.
        zeros: float16 [N, K/group], or None for mid-rise levels.
        bias: [N] or None.

    Returns:
        [..., N] in the dtype of `x`, contiguous.

    Raises:
        ValueError: if no supported layout fits the shapes.
    """
    in_features, out_features = x.shape[-1], qweight.shape[0]
    bits, group = layout_of(qweight, scales, in_features)
    out = x.new_empty(*x.shape[:-1], out_features)
    if out.numel() == 0:
        return out
    flat = x.reshape(-1, in_features)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    rows = flat.shape[0]
    config = launch_config(rows, bits, group, x.dtype)
    grid = (triton.cdiv(out_features, config["BLOCK_N"]), triton.cdiv(rows, config["BLOCK_M"]))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        _linear_kernel[grid](
            flat,
            qweight.contiguous(),
            scales.contiguous(),
            None if zeros is None else zeros.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            rows,
            flat.stride(0),
            in_features,
            out_features,
            **config,
        )
    return out
