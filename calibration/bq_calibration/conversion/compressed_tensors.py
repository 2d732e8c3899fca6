"""compressed-tensors' `pack-quantized` (llm-compressor).

Layout of a layer [N, K]: `weight_packed` int32 [N, words], packed along K; `weight_scale` [N, K/group];
`weight_zero_point` int32 [words, K/group], packed along N, where it is asymmetric; `weight_shape`. Words of 3 bits hold
ten whole codes (version 0.17, say), or are a bit stream (0.20); their number tells which. Codes and zero points are
stored as signed numbers plus 2^(bits − 1).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import UserError
from .layer import Levels, find_packing, num_words, unpack_words
from .source import FolderSource

_FORMAT = "pack-quantized"


class CompressedTensorsSource(FolderSource):
    """A checkpoint of llm-compressor with packed integer weights and 16-bit activations.

    Raises:
        UserError: for another format, quantized activations, rotations, or columns out of order.
    """

    codes_suffix = "weight_packed"
    suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.method = f"compressed-tensors, {_FORMAT}"
        _check(folder, config["quantization_config"])
        super().__init__(folder, config)
        for name in self.layers:
            if f"{name}.weight_g_idx" in self.store:
                raise UserError(
                    f"{name}.weight_g_idx: columns of a group are not neighbours (actorder group); quantize with "
                    "actorder static or none"
                )

    def bits(self, layer: str) -> int:
        """See `Source`."""
        return self._packing(layer)[0]

    def _packing(self, layer: str) -> tuple[int, bool]:
        name = f"{layer}.weight_packed"
        return find_packing(name, self.store.shape(name)[1], self.layers[layer][1], True, False)

    def levels(self, layer: str) -> Levels:
        """See `Source`."""
        rows, (bits, dense) = self.layers[layer][0], self._packing(layer)
        groups = self.store.shape(f"{layer}.weight_scale")[-1]
        scales = self.expect(f"{layer}.weight_scale", rows, groups)
        if (name := f"{layer}.weight_zero_point") not in self.store:
            return Levels(scales, torch.full_like(scales, 1 << (bits - 1)))
        words = self.expect(name, num_words(rows, bits, dense), groups)
        return Levels(scales, unpack_words(words.t(), bits, rows, dense).t())

    def codes(self, layer: str) -> torch.Tensor:
        """See `Source`."""
        (rows, columns), (bits, dense) = self.layers[layer], self._packing(layer)
        words = self.expect(f"{layer}.weight_packed", rows, num_words(columns, bits, dense))
        return unpack_words(words, bits, columns, dense)


def _check(folder: Path, quantization: dict[str, Any]) -> None:
    """Refuse what is not weight-only integers in the one format that is read."""
    groups = quantization.get("config_groups") or {}
    for name, group in groups.items():
        packing = group.get("format") or quantization.get("format")
        if packing != _FORMAT:
            raise UserError(f"{folder}: {name} has format {packing!r}; only {_FORMAT!r} holds codes of 2 to 4 bits")
        if (group.get("weights") or {}).get("type", "int") != "int":
            raise UserError(f"{folder}: {name} has weights of type {group['weights']['type']!r}; the format holds int")
        for part in ("input_activations", "output_activations"):
            if group.get(part):
                raise UserError(f"{folder}: {name} quantizes {part}; the format is weight-only")
    for key in ("transform_config", "kv_cache_scheme"):
        if quantization.get(key):
            raise UserError(f"{folder}: {key} is set; a checkpoint of ours cannot hold it")
    if (sparsity := (quantization.get("sparsity_config") or {}).get("format", "dense")) != "dense":
        raise UserError(f"{folder}: sparsity_config {sparsity!r} is not read; 'dense' is")
