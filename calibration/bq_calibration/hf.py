"""Butterfly checkpoints in transformers: import this module, then `AutoModelForCausalLM.from_pretrained(CKPT)`.

A multimodal one is loaded with `AutoModelForImageTextToText`, as its original is.

Without the import transformers refuses the checkpoint: the entry `transformers_weights` of its config.json sees to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bq_kernels import checksums
from bq_kernels.format import QUANT_METHOD, FormatError, QuantConfig
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .architecture import expert_layers
from .checkpoint import verify
from .errors import UserError
from .experts import join_experts, split_experts
from .packed_modules import pack, unpack
from .skeleton import other_parts


class ButterflyHfConfig(QuantizationConfigMixin):
    """`quantization_config` of a butterfly checkpoint, parsed strictly."""

    def __init__(self, **kwargs: Any):
        self.quant_method = QUANT_METHOD
        self.parsed = QuantConfig.from_dict({"quant_method": QUANT_METHOD} | kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The table as config.json holds it."""
        return self.parsed.to_dict()


class ButterflyHfQuantizer(HfQuantizer):
    """Verifies a checkpoint, then puts packed modules in place of all that it stores packed."""

    requires_calibration = True

    def _unguarded(self, config):
        """Take out the entry that stops a transformers without this module; files are looked up after this hook."""
        for part in (config, config.get_text_config()):
            if getattr(part, "transformers_weights", None) is not None:
                del part.transformers_weights
        return config

    update_tp_plan = update_attn_implementation = _unguarded  # older versions call the one, newer ones the other

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if checkpoint_files:
            folder = Path(checkpoint_files[0]).parent
            try:
                checksums.compare_for_loading(folder)
            except FormatError as error:
                raise UserError(str(error)) from error
            verify(folder)
        if model.base_model is model:  # whose modules have other names than the checkpoint's
            raise UserError(
                f"packed weights do not load into a bare {type(model).__name__}; load the model with its head"
            )
        config: QuantConfig = self.quantization_config.parsed
        self._dtype = model.get_input_embeddings().weight.dtype
        self._mixture = expert_layers(model.config.model_type) is not None
        split_experts(model)
        pack(model, config)
        # float16 values of the format stay exact in a bfloat16 model
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "scales", "zeros", "angles"}

    def update_weight_conversions(self, weight_conversions, *model):
        """None for a mixture of experts: its modules are called as in files, no weights are stacked."""
        return [] if self._mixture else super().update_weight_conversions(weight_conversions, *model)

    def _process_model_after_weight_loading(self, model, **kwargs):
        # with a quantizer transformers leaves tensors that files call otherwise than the model in their stored dtype
        for part in other_parts(model):
            for parameter in model.base_model.get_submodule(part).parameters():
                parameter.data = parameter.data.to(self._dtype)
        return model

    def _dequantize(self, model, dtype=None):
        unpack(model, dtype)
        join_experts(model)
        return model

    def is_serializable(self):
        """No: a loaded model holds the float16 tensors as float32. Copy the folder, or `dequantize()` it."""
        return False

    @property
    def is_trainable(self):
        """Packed layers have no gradient."""
        return False


if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:  # both registrations raise on a second call
    register_quantization_config(QUANT_METHOD)(ButterflyHfConfig)
    register_quantizer(QUANT_METHOD)(ButterflyHfQuantizer)
