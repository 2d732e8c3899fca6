"""vLLM's gpt-oss loads experts from stacked tensors, and drops what it does not know; ours have names of their own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from bq_kernels.format import FormatError
from vllm.model_executor.models.gpt_oss import GptOssModel
from vllm.model_executor.models.utils import is_pp_missing_parameter

from .experts import StoredExperts

# vLLM has renamed a bias by then: `experts.3.down_proj.bias` is `experts.3.w2_bias`
_TENSOR = re.compile(r"(?P<module>.*\.mlp\.experts)\.(?P<expert>\d+)\.(?:(?P<last>\w+)\.(?P<suffix>\w+)|w2_bias)")


def load_single_experts() -> None:
    """Let `GptOssModel.load_weights` load experts one by one where they are packed, in this process."""
    if not hasattr(GptOssModel, "butterfly_load_weights"):
        GptOssModel.butterfly_load_weights = GptOssModel.load_weights
        GptOssModel.load_weights = _load_weights


def _load_weights(model: GptOssModel, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
    """`GptOssModel.load_weights` with packed experts.

    Raises:
        FormatError: for a packed embedding, which vLLM's model has no place for; and from the loaders of experts.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "quant_method", None), StoredExperts)
    }
    loaded: set[str] = set()

    def others() -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            if name.endswith("embed_tokens.qweight"):
                raise FormatError(
                    f"{name}: vLLM's gpt-oss takes no packed embedding; calibrate with --embedding-bits 16"
                )
            if not (match := _TENSOR.fullmatch(name)) or not modules:
                yield name, tensor
            elif not is_pp_missing_parameter(name, model):
                own, module = next(each for each in modules.items() if each[0].startswith(match["module"]))
                place = match["last"] or "down_proj", match["suffix"] or "bias"
                param = module.quant_method.load_named(module, int(match["expert"]), *place, tensor)
                loaded.add(f"{own}.{param}")

    return model.butterfly_load_weights(others()) | loaded
