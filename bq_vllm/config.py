"""What vLLM asks a quantization about: which layers it covers, and how their weights are handled."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bq_kernels.checksums import compare_for_loading, read_header
from bq_kernels.format import QUANT_METHOD, FormatError, QuantConfig
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

BACKEND_VARIABLE = "BQ_VLLM_BACKEND"


def chosen_backend() -> str:
    """The backend that the environment asks for; empty where the platform shall decide."""
    return os.environ.get(BACKEND_VARIABLE, "")


def check_shards(directory: Path) -> None:
    """Refuse a local checkpoint with a damaged or missing file; vLLM's own error names none, or there is no error.

    Raises:
        FormatError: naming the file, and the tensor where that can be told.
    """
    for index in directory.glob("*.safetensors.index.json"):
        try:
            shards = sorted({directory / name for name in json.loads(index.read_bytes())["weight_map"].values()})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise FormatError(f"{index}: not a valid index; download it again") from None
        for shard in shards:
            if not shard.is_file():
                raise FormatError(f"{shard}: missing, though {index.name} lists it")
    for path in sorted(directory.glob("*.safetensors")):
        read_header(path)
    compare_for_loading(directory)


class ButterflyConfig(QuantizationConfig):
    """`quantization_config` of a checkpoint as vLLM sees it.

    Args:
        quant: the parsed table.
    """

    def __init__(self, quant: QuantConfig) -> None:
        super().__init__()
        self.quant = quant

    def get_name(self) -> str:
        """The name behind `--quantization`."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Activation dtypes that the kernels take."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere: what Triton's kernels need on CUDA."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """A file that no model has: then vLLM says clearly that a model without `quantization_config` has no config."""
        return ["butterfly_quantization_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ButterflyConfig:
        """Parse `quantization_config`.

        Raises:
            FormatError: on anything that format version 1 does not know.
        """
        return cls(QuantConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, *args, **kwargs) -> None:
        """Nothing to update, but the first place that knows the checkpoint: refuses damaged files by name."""
        check_shards(Path(model_name))

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """Rename the modules of the config as vLLM renames the model's."""
        names = hf_to_vllm_mapper.apply_list(list(self.quant.modules_to_not_convert))
        bits = hf_to_vllm_mapper.apply_dict(self.quant.module_bits)
        self.quant = replace(self.quant, modules_to_not_convert=tuple(names), module_bits=bits)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Method for a layer; None, vLLM's default, for attention and embeddings.

        Raises:
            FormatError: for experts, and for fused layers whose parts the checkpoint treats differently.
        """
        # here, since vLLM imports the config before it wants torch.compile to be touched
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod

        from .linear import ButterflyLinearMethod

        # by name: the class moved and changed its name within the supported versions
        if {"FusedMoE", "RoutedExperts"} & {base.__name__ for base in type(layer).__mro__}:
            if self.quant.skips(prefix):
                return None
            raise FormatError(
                f"{prefix}: experts cannot be quantized with {QUANT_METHOD!r} yet; "
                "list them in modules_to_not_convert and store them unquantized"
            )
        if not isinstance(layer, LinearBase):
            return None

        parent, _, last = prefix.rpartition(".")
        parts = self.packed_modules_mapping.get(last, [last])
        modules = [f"{parent}.{part}" if parent else part for part in parts]
        skipped = [self.quant.skips(module) for module in modules]
        if all(skipped) or self.quant.skips(prefix):
            return UnquantizedLinearMethod()
        if any(skipped):
            raise FormatError(
                f"{prefix}: vLLM fuses {parts}, but modules_to_not_convert holds only "
                f"{[part for part, skip in zip(parts, skipped, strict=True) if skip]}; hold all of them or none"
            )
        rotation = self.quant.rotation
        if len({rotation.block(module) for module in modules}) > 1:
            blocks = {part: rotation.block(module) for part, module in zip(parts, modules, strict=True)}
            raise FormatError(f"{prefix}: vLLM fuses layers that share an input, so their rotation blocks: {blocks}")
        bits = {part: self.quant.bits_of(module) for part, module in zip(parts, modules, strict=True)}
        if len(set(bits.values())) > 1:
            raise FormatError(f"{prefix}: vLLM fuses layers that then need as many bits each: {bits}")
        return ButterflyLinearMethod(self.quant, modules)
