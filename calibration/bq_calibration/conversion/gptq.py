"""GPTQ's packing: AutoGPTQ, GPTQModel, AutoRound.

Layout of a layer [N, K] (AutoGPTQ): `qweight` int32 [K·bits/32, N] and `qzeros` int32 [K/group, N·bits/32] are
little-endian bit streams along K and along N, 3 bits included; `scales` [K/group, N]; `g_idx` [K], the group of every
column. `qzeros` holds z − 1 (format `gptq`) or z (`gptq_v2`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bq_kernels.format import BITS, largest_code

from ..errors import UserError
from .layer import Levels, find_packing, num_words, unpack_words
from .source import FolderSource


class GptqSource(FolderSource):
    """A checkpoint in GPTQ's packing.

    Args:
        folder: of the checkpoint.
        config: its config.json.
        quantization: its quantization settings, which may be in a file of their own.

    Raises:
        UserError: for a packing that is not plain GPTQ, or columns out of order (`desc_act`).
    """

    codes_suffix = "qweight"
    suffixes = ("qweight", "qzeros", "scales", "g_idx")
    dense = True  # words are a bit stream

    def __init__(self, folder: Path, config: dict[str, Any], quantization: dict[str, Any]):
        self.zero_offset, self.method = _packing(folder, quantization)
        if quantization.get("bits") not in (*BITS, None):
            raise UserError(f"{folder}: {quantization['bits']} bits; the format holds codes of {list(BITS)} bits")
        super().__init__(folder, config | {"quantization_config": quantization})
        for name in self.layers:
            self._check_order(name)

    def _check_order(self, layer: str) -> None:
        """Refuse columns whose groups are out of order, as `desc_act` leaves them."""
        if f"{layer}.g_idx" not in self.store:
            return
        columns, group = self.layers[layer][1], self._group(layer)
        order = self.expect(f"{layer}.g_idx", columns)
        if not torch.equal(order.long(), torch.arange(columns) // group):
            raise UserError(
                f"{layer}.g_idx: columns of a group are not neighbours (desc_act); the format keeps them in order, "
                "and sorting them would need a permutation of the input"
            )

    def _group(self, layer: str) -> int:
        columns, groups = self.layers[layer][1], self.store.shape(f"{layer}.scales")[0]
        if columns % groups:
            raise UserError(f"{layer}: {groups} groups do not divide {columns} input features")
        return columns // groups

    def bits(self, layer: str) -> int:
        """See `Source`."""
        name = f"{layer}.qweight"
        return find_packing(name, self.store.shape(name)[0], self.layers[layer][1], self.dense)[0]

    def levels(self, layer: str) -> Levels:
        """See `Source`."""
        rows, columns = self.layers[layer]
        bits, groups = self.bits(layer), columns // self._group(layer)
        words = self.expect(f"{layer}.qzeros", groups, num_words(rows, bits, self.dense))
        stored = unpack_words(words, bits, rows, self.dense)
        if self.zero_offset and bool((stored == largest_code(bits)).any()):
            raise UserError(
                f"{layer}.qzeros: holds zero points of 0 as −1, which packages read in different ways; save the "
                "source with checkpoint_format gptq_v2"
            )
        zeros = stored.to(torch.int16) + self.zero_offset
        return Levels(self.expect(f"{layer}.scales", groups, rows).t(), zeros.t())

    def codes(self, layer: str) -> torch.Tensor:
        """See `Source`."""
        rows, columns = self.layers[layer]
        bits = self.bits(layer)
        words = self.expect(f"{layer}.qweight", num_words(columns, bits, self.dense), rows)
        return unpack_words(words.t().contiguous(), bits, columns, self.dense)


def _packing(folder: Path, quantization: dict[str, Any]) -> tuple[int, str]:
    """What `qzeros` lacks to the zero point, and the method's name.

    Raises:
        UserError: for a packing that is not GPTQ's.
    """
    method = quantization.get("quant_method", "gptq")
    if method == "auto-round":
        packing = quantization.get("packing_format", "auto_round")
        if quantization.get("act_bits", 16) not in (16, None) or quantization.get("data_type", "int") != "int":
            raise UserError(f"{folder}: activations or weights that are not integers; only weight-only int is held")
        offsets = {"auto_round:auto_gptq": 1, "auto_round": 0, "auto_round:exllamav2": 0}
        if packing not in offsets:
            raise UserError(f"{folder}: packing_format {packing!r} is not read; known are {', '.join(offsets)}")
        return offsets[packing], f"AutoRound, packed as {packing}"
    packing = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    offsets = {"gptq": 1, "gptq_v2": 0}
    if packing not in offsets:
        raise UserError(f"{folder}: checkpoint_format {packing!r} is not read; known are {', '.join(offsets)}")
    if (quantization.get("pack_dtype") or "int32") != "int32":
        raise UserError(f"{folder}: pack_dtype {quantization['pack_dtype']!r} is not read; int32 is")
    return offsets[packing], f"GPTQ, packed as {packing}"
