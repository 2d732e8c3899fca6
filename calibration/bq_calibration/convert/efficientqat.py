"""EfficientQAT's own packing (arXiv 2407.11062, `int_linear_real`): GPTQ's tensors with words of whole codes.

Layout of a layer [N, K]: `qweight` int32 [⌈K / (32 // bits)⌉, N], 32 // bits codes per word along K; `qzeros` int32
[K/group, ⌈N / (32 // bits)⌉], along N, z itself; `scales` [K/group, N]. Its config.json says nothing of quantization.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .gptq import GptqSource
from .layer import Levels, bits_of_words, unpack_words


class EfficientQatSource(GptqSource):
    """A checkpoint of EfficientQAT with real (not fake) quantization."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        super().__init__(folder, config, {"checkpoint_format": "gptq_v2"})
        self.method, self.quantization = "EfficientQAT", {}

    def bits(self, layer: str) -> int:
        """See `Source`."""
        name = f"{layer}.qweight"
        return bits_of_words(name, self.store.shape(name)[0], self.layers[layer][1], straddling=False)

    def levels(self, layer: str) -> Levels:
        """See `Source`."""
        rows, columns = self.layers[layer]
        bits, groups = self.bits(layer), columns // self._group(layer)
        words = self.expect(f"{layer}.qzeros", groups, -(-rows // (32 // bits)))
        return Levels(self.expect(f"{layer}.scales", groups, rows).t(), unpack_words(words, bits, rows).t())

    def codes(self, layer: str) -> torch.Tensor:
        """See `Source`."""
        rows, columns = self.layers[layer]
        bits = self.bits(layer)
        words = self.expect(f"{layer}.qweight", -(-columns // (32 // bits)), rows)
        return unpack_words(words.t(), bits, columns)
