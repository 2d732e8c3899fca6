"""EfficientQAT's own packing (arXiv 2407.11062, `int_linear_real`): GPTQ's tensors with words of whole codes.

A word of 3-bit codes holds ten of them and two unused bits, in `qweight` along K and in `qzeros` along N. `qzeros`
holds z. config.json says nothing of quantization.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .gptq import GptqSource


class EfficientQatSource(GptqSource):
    """A checkpoint of EfficientQAT with real (not fake) quantization."""

    dense = False

    def __init__(self, folder: Path, config: dict[str, Any]):
        super().__init__(folder, config, {"checkpoint_format": "gptq_v2"})
        self.method, self.quantization = "EfficientQAT", {}
