"""Which package wrote a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import UserError
from ..files import read_json
from ..model import resolve_model
from .source import Source

EFFICIENTQAT = "efficientqat"
_REFUSED = {
    "bitnet": "rounds activations to 8 bits in its layers; the format is weight-only",
    "bitsandbytes": "has levels that are not evenly spaced (nf4), or 8 bits",
    "hqq": "packs in pickled or package-specific forms",
    "butterfly": "is a checkpoint of this project already",
}


def open_source(source: str, method: str | None = None) -> Source:
    """A quantized checkpoint, read by the module of its format.

    Args:
        source: folder, hub name, or GGUF file.
        method: `efficientqat`, whose config.json does not say so.

    Raises:
        UserError: if no module reads it, or it holds what the format cannot.
    """
    if method not in (None, EFFICIENTQAT):
        raise UserError(
            f"--method {method}: expected {EFFICIENTQAT}; other methods are told by the source's config.json"
        )
    if Path(source).suffix.lower() == ".gguf":
        from .gguf import GgufSource

        if not Path(source).is_file():
            raise UserError(f"{source}: no such file; a GGUF file of the hub has to be downloaded first")
        return GgufSource(Path(source))
    folder = resolve_model(source)
    config = read_json(folder / "config.json", missing="is this the folder of a Hugging Face model?")
    if method == EFFICIENTQAT:
        from .efficientqat import EfficientQatSource

        return EfficientQatSource(folder, config)
    quantization = _quantization(folder, config)
    return _by_method(folder, config | {"quantization_config": quantization}, quantization)


def _quantization(folder: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The quantization settings: in config.json, or beside it where older packages write them."""
    if found := config.get("quantization_config") or config.get("compression_config"):
        return found
    for name, default in (("quantize_config.json", {"quant_method": "gptq"}), ("quant_config.json", _OLD_AWQ)):
        if (folder / name).is_file():
            return default | read_json(folder / name, missing="")
    raise UserError(
        f"{folder}: config.json says nothing of quantization; give a quantized checkpoint, or --method {EFFICIENTQAT} "
        "for one of EfficientQAT"
    )


_OLD_AWQ = {"quant_method": "awq"}


def _by_method(folder: Path, config: dict[str, Any], quantization: dict[str, Any]) -> Source:
    from .awq import AwqSource
    from .compressed_tensors import CompressedTensorsSource
    from .gptq import GptqSource

    method = quantization.get("quant_method", "gptq")
    awq_packing = "awq" in quantization.get("packing_format", "")
    if method == "awq" or (method == "auto-round" and awq_packing):
        return AwqSource(folder, config)
    if method in ("gptq", "auto-round"):
        return GptqSource(folder, config, quantization)
    if method == "compressed-tensors":
        return CompressedTensorsSource(folder, config)
    reason = _REFUSED.get(method, "is not read; gptq, auto-round, awq and compressed-tensors are, and GGUF files")
    raise UserError(f"{folder}: quant_method {method!r} {reason}")
