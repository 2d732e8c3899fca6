"""AWQ's packing for its GEMM kernel (AutoAWQ, AutoRound).

Layout of a layer [N, K]: `qweight` int32 [K, N/8] and `qzeros` int32 [K/group, N/8], eight codes of 4 bits per word
along N; the lowest bits hold output 0, then 2, 4, 6, 1, 3, 5, 7 of the eight. `scales` [K/group, N]. `qzeros` holds z.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bq_kernels.packing import unpack

from ..errors import UserError
from .layer import Levels
from .source import FolderSource

_BITS = 4
_ORDER = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # output that field i of a word holds


class AwqSource(FolderSource):
    """A checkpoint in AWQ's GEMM packing.

    Raises:
        UserError: for another number of bits or another packing.
    """

    codes_suffix = "qweight"
    suffixes = ("qweight", "qzeros", "scales")

    def __init__(self, folder: Path, config: dict[str, Any]):
        quantization = config["quantization_config"]
        bits, packing = quantization.get("bits", _BITS), quantization.get("version", "gemm")
        if bits != _BITS:
            raise UserError(f"{folder}: AWQ with {bits} bits is not read; {_BITS} bits are")
        if quantization.get("quant_method") == "awq" and packing.lower() != "gemm":
            raise UserError(f"{folder}: AWQ version {packing!r} is not read; 'gemm' is")
        self.method = "AWQ, packed for gemm"
        super().__init__(folder, config)

    def bits(self, layer: str) -> int:
        """See `Source`."""
        return _BITS

    def levels(self, layer: str) -> Levels:
        """See `Source`."""
        rows, _ = self.layers[layer]
        groups = self.store.shape(f"{layer}.scales")[0]
        zeros = _unpack(self.expect(f"{layer}.qzeros", groups, rows * _BITS // 32))
        return Levels(self.expect(f"{layer}.scales", groups, rows).t(), zeros.t())

    def codes(self, layer: str) -> torch.Tensor:
        """See `Source`."""
        rows, columns = self.layers[layer]
        return _unpack(self.expect(f"{layer}.qweight", columns, rows * _BITS // 32)).t().contiguous()


def _unpack(words: torch.Tensor) -> torch.Tensor:
    """uint8 [R, N] of int32 [R, N/8]."""
    fields = unpack(words, _BITS).unflatten(1, (-1, len(_ORDER)))
    return fields[..., _ORDER.argsort()].flatten(1)
