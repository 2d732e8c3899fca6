"""Quantization config of butterfly checkpoints in vLLM: the layers that it covers and the method of each."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bq_kernels.checksums import compare_for_loading
from bq_kernels.format import EMBEDDING, QUANT_METHOD, FormatError, QuantConfig
from bq_kernels.shards import tensor_files
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.transformers_utils.repo_utils import try_get_local_file


def check_shards(directory: Path) -> None:
    """Refuse a local checkpoint with a damaged, missing or surplus file; vLLM's own error names none, or there is none.

    Raises:
        FormatError: naming the file, and the tensor where that can be told.
    """
    # without any weights it is a config for `--load-format dummy`, or vLLM says what is missing
    if any(directory.glob("*.safetensors*")):
        tensor_files(directory)
    compare_for_loading(directory)


def check_cached(repo: str, revision: str | None) -> None:
    """Refuse damaged files of a Hub model that an earlier start has downloaded; what is not there yet is left to vLLM.

    Raises:
        FormatError: naming the file, and the tensor where that can be told.
    """
    config = try_get_local_file(repo, "config.json", revision)
    if isinstance(config, Path):
        compare_for_loading(config.parent)


class ButterflyConfig(QuantizationConfig):
    """vLLM's view of the `quantization_config` of a checkpoint.

    Args:
        quant: the parsed `quantization_config`.
    """

    def __init__(self, quant: QuantConfig) -> None:
        super().__init__()
        self.quant = quant

    def get_name(self) -> str:
        """The value of `--quantization`."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Activation dtypes that the kernels support."""
        return [torch.float16, torch.bfloat16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Ampere (8.0), the oldest CUDA capability that the Triton kernels run on."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """A file that no model has: for a model without `quantization_config`, vLLM then reports that it is missing."""
        return ["butterfly_quantization_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ButterflyConfig:
        """Parse `quantization_config`.

        Raises:
            FormatError: naming the key that format version 1 does not allow.
        """
        return cls(QuantConfig.from_dict(config))

    def maybe_update_config(self, model_name: str, *args, revision: str | None = None, **kwargs) -> None:
        """Refuse damaged files by name; vLLM calls this first with the checkpoint known, and nothing is updated."""
        if Path(model_name).is_dir():
            check_shards(Path(model_name))
        else:
            check_cached(model_name, revision)

    def apply_vllm_mapper(self, hf_to_vllm_mapper) -> None:
        """Rename the modules that the config names as vLLM renames those of the model.

        A mapper renames tensors: its prefixes may end in dots (`lm_head.`), which a module's name has not.
        """

        def renamed(module: str) -> list[str]:
            return [name.removesuffix(".weight") for name in hf_to_vllm_mapper.apply_list([f"{module}.weight"])]

        names = tuple(name for module in self.quant.modules_to_not_convert for name in renamed(module))
        bits, kept = (
            {name: value for module, value in table.items() for name in renamed(module)}
            for table in (self.quant.module_bits, self.quant.kept_tokens)
        )
        self.quant = replace(self.quant, modules_to_not_convert=names, module_bits=bits, kept_tokens=kept)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Method of a layer; None, vLLM's default, for attention, and an embedding or LM head that is not packed.

        Raises:
            FormatError: for fused layers whose parts the checkpoint treats differently.
        """
        # imported late: linear.py loads vLLM's layers, which set up torch.compile, and vLLM imports this file earlier
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from .linear import ButterflyLinearMethod

        # by name: the class was moved and renamed within the supported versions of vLLM
        if {"FusedMoE", "RoutedExperts"} & {base.__name__ for base in type(layer).__mro__}:
            if self.quant.skips(prefix):
                return None
            from .experts import experts_method

            if getattr(layer.moe_config, "has_bias", False):  # vLLM's only model with such experts
                from .gpt_oss import load_single_experts

                load_single_experts()
            return experts_method(self.quant, prefix, layer.moe_config)
        if isinstance(layer, VocabParallelEmbedding):
            return self._method_of_embedding(layer, prefix)
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
            raise FormatError(f"{prefix}: vLLM fuses layers, which then need the same rotation block: {blocks}")
        bits = {part: self.quant.bits_of(module) for part, module in zip(parts, modules, strict=True)}
        if len(set(bits.values())) > 1:
            raise FormatError(f"{prefix}: vLLM fuses layers, which then need the same number of bits: {bits}")
        return ButterflyLinearMethod(self.quant, modules)

    def _method_of_embedding(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Method of an embedding or an LM head; None where it is not packed."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

        from .embedding import ButterflyEmbeddingMethod, TiedHeadMethod, UntiedHeadMethod

        embeddings = [name for name in self.quant.module_bits if name.rpartition(".")[2] == EMBEDDING]
        is_head = isinstance(layer, ParallelLMHead)
        # vLLM's LLaMA does not tell its embedding its name
        name = prefix or (embeddings[0] if len(embeddings) == 1 and not is_head else prefix)
        if self.quant.packs(name):
            return ButterflyEmbeddingMethod(self.quant, name)
        if is_head and embeddings:
            return UntiedHeadMethod(name) if self.quant.skips(name) else TiedHeadMethod(name)
        return None
