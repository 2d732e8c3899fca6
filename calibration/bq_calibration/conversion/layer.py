"""A linear layer as another package quantized it, brought to what the format can hold, or refused."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from bq_kernels.format import BITS, largest_code, midrise_zero
from bq_kernels.packing import pack, unpack
from torch.nn.functional import pad

from ..errors import UserError

_ROWS = 512  # packed at a time: codes take 64 bytes each on the way


@dataclass(frozen=True)
class Levels:
    """Scales and zero points of a layer, W = s·(q − z), as its package has them.

    Attributes:
        scales: [N, K/group], any float dtype and sign.
        zeros: [N, K/group], integers or floats.
    """

    scales: torch.Tensor
    zeros: torch.Tensor


@dataclass(frozen=True)
class ExactLevels:
    """The same levels as the format holds them: float16, scales above zero.

    Attributes:
        scales: float16 [N, K/group].
        zeros: float16 [N, K/group].
        flipped: bool [N, K/group]: the source's scale is negative; s·(q − z) = |s|·((L − q) − (L − z)), L the top code.
        empty: bool [N, K/group]: the source's scale is zero; codes and zero become 0, the scale 1.
    """

    scales: torch.Tensor
    zeros: torch.Tensor
    flipped: torch.Tensor
    empty: torch.Tensor

    def is_midrise(self, bits: int) -> bool:
        """Whether every zero point is the middle of the codes."""
        return bool((self.zeros == midrise_zero(bits)).all())

    def codes(self, codes: torch.Tensor, bits: int) -> torch.Tensor:
        """The source's codes, uint8 [N, K], for these levels."""
        groups = codes.unflatten(1, (self.scales.shape[1], -1))
        groups = torch.where(self.flipped[..., None], largest_code(bits) - groups, groups)
        return groups.masked_fill(self.empty[..., None], 0).flatten(1)


def exact_levels(name: str, levels: Levels, bits: int) -> ExactLevels:
    """Levels in float16, if that is exact.

    Args:
        name: of the layer, for messages.
        levels: as the package has them.
        bits: bits per code.

    Raises:
        UserError: if a scale or a zero point is no float16 number.
    """
    scales = _float16(f"{name}: scales", levels.scales)
    zeros = _float16(f"{name}: zero points", levels.zeros)
    flipped, empty = scales < 0, scales == 0
    zeros = torch.where(flipped, largest_code(bits) - zeros, zeros)
    return ExactLevels(scales.abs().masked_fill(empty, 1), zeros.masked_fill(empty, 0), flipped, empty)


def _float16(what: str, values: torch.Tensor) -> torch.Tensor:
    half = values.to(torch.float16)
    wrong = half.double() != values.double()  # NaN too
    if bool(wrong.any()):
        dtype = str(values.dtype).removeprefix("torch.")
        raise UserError(
            f"{what} in {dtype}: {int(wrong.sum())} of {wrong.numel()} are no float16 numbers "
            f"({values[wrong][0].item():.8g} is the first); the format cannot hold them exactly"
        )
    return half


def pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """`bq_kernels.packing.pack`, some rows at a time."""
    return torch.cat([pack(rows, bits) for rows in codes.split(_ROWS)])


def num_words(count: int, bits: int, dense: bool) -> int:
    """int32 words of `count` codes: of a bit stream if `dense`, else of words with 32 // bits whole codes each."""
    return -(-count * bits // 32) if dense else -(-count // (32 // bits))


def find_packing(name: str, words: int, count: int, *dense: bool) -> tuple[int, bool]:
    """Bits per code, and whether the words are a bit stream, that the number of words implies.

    Args:
        name: of the tensor, for messages.
        words: number of int32 words.
        count: number of codes.
        dense: packings to think of.

    Raises:
        UserError: if neither fits with bits that the format has.
    """
    for stream in dense:
        for bits in BITS:
            if words == num_words(count, bits, stream):
                return bits, stream
    raise UserError(f"{name}: {words} words for {count} codes; the format holds codes of {list(BITS)} bits")


def unpack_words(words: torch.Tensor, bits: int, count: int, dense: bool) -> torch.Tensor:
    """Codes, uint8 [..., count], of int32 [..., num_words(count, bits, dense)], the first in the lowest bits."""
    if dense:
        return unpack(pad(words, (0, -words.shape[-1] % bits)), bits)[..., :count]
    shifts = torch.arange(32 // bits, dtype=torch.int32) * bits
    return ((words.unsqueeze(-1) >> shifts) & largest_code(bits)).flatten(-2)[..., :count].to(torch.uint8)
