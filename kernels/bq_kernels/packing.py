"""Codes to int32 words and back: every row is one little-endian bit stream (format.py, `qweight`)."""

from __future__ import annotations

import torch

from .format import largest_code


def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack integer codes along the last dimension.

    Args:
        codes: [..., K] integers in [0, largest_code(bits)]; K·bits must be a multiple of 32.
        bits: bits per code.

    Returns:
        int32 [..., K·bits/32]; the code of column k occupies bits [bits·k, bits·(k+1)) of the row.

    Raises:
        ValueError: if a code is out of range or the row does not fill whole words.
    """
    columns = codes.shape[-1]
    if columns * bits % 32:
        raise ValueError(f"{columns} codes of {bits} bits do not fill whole 32-bit words")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) > largest_code(bits)):
        raise ValueError(f"codes must lie in [0, {1 << bits})")
    stream = (codes.unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1
    words = stream.reshape(*codes.shape[:-1], columns * bits // 32, 32).to(torch.int64)
    packed = (words << torch.arange(32, device=codes.device)).sum(-1)
    return torch.where(packed >= 1 << 31, packed - (1 << 32), packed).to(torch.int32)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of `pack`: int32 [..., W] words to uint8 [..., 32·W/bits] codes."""
    mask = largest_code(bits)
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, device=packed.device, dtype=torch.int32)
        return ((packed.unsqueeze(-1) >> shifts) & mask).flatten(-2).to(torch.uint8)
    columns = packed.shape[-1] * 32 // bits
    bit = torch.arange(columns, device=packed.device) * bits
    word, shift = bit // 32, bit % 32
    codes = (packed[..., word] >> shift) & mask
    high = packed[..., (word + 1).clamp(max=packed.shape[-1] - 1)]
    # an arithmetic right shift of the low word fills with the sign: keep only its own 32 − shift bits
    low = codes & ((1 << (32 - shift).clamp(max=bits)) - 1)
    straddling = (low | (high << (32 - shift).clamp(max=31))) & mask
    codes = torch.where(shift + bits > 32, straddling, codes)
    return codes.to(torch.uint8)
