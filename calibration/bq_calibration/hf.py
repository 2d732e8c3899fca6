"""Butterfly checkpoints in transformers: import this module, then `AutoModelForCausalLM.from_pretrained(CKPT)`.

A multimodal one is loaded with `AutoModelForImageTextToText`, as its original is.

Without the import transformers refuses the checkpoint: the entry `transformers_weights` of its config.json sees to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bq_kernels import checksums, ops
from bq_kernels.format import QUANT_METHOD, FormatError, QuantConfig
from bq_kernels.prepared import PreparedWeights, prepare_weights, prepared_linear
from bq_kernels.reference import angles_of, dense_weight
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from .checkpoint import quantized_layers, verify
from .errors import UserError
from .skeleton import other_parts


def runs_kernels(device: torch.device) -> bool:
    """Whether the packed product runs as a Triton kernel on `device`; otherwise it is plain torch on stored tensors."""
    return device.type != "cpu" or ops.interpreted()


class ButterflyLinear(nn.Module):
    """A linear layer that rotates its input and multiplies with packed weights; inference only.

    Args:
        config: quantization config of the checkpoint.
        name: full name of the layer; its last part selects the rotation block.
        linear: the layer that it replaces; its shape and bias are taken over.
    """

    def __init__(self, config: QuantConfig, name: str, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.kind = config.rotation.kind
        self.block_size = config.rotation.block(name)
        self.zeros = self.angles = None
        for suffix, spec in config.tensors(name, self.in_features, self.out_features).items():
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            setattr(self, suffix, nn.Parameter(tensor, requires_grad=False))
        self.bias = linear.bias
        self._prepared_for: torch.device | None = None
        self._weights: PreparedWeights | None = None

    def _stored(self) -> tuple:
        """The layer in the checkpoint's layout: the arguments of `dense_weight` and `prepare_weights`."""
        angles = angles_of(self.kind, self.angles, self.in_features, self.block_size, self.qweight.device)
        return self.qweight, self.scales, self.zeros, angles, self.block_size, self.in_features

    def _apply(self, fn, recurse=True):
        """Move the format's tensors, but never round them: `model.to(torch.bfloat16)` casts only the bias."""
        exact = {id(tensor) for tensor in (self.qweight, self.scales, self.zeros, self.angles) if tensor is not None}

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            return new if id(tensor) not in exact or new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(apply, recurse)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y = W′ Q x + bias; x [..., in_features] to [..., out_features], same dtype."""
        if self._prepared_for != x.device:
            self._weights = prepare_weights(*self._stored(), tiled=runs_kernels(x.device))
            self._prepared_for = x.device
        return prepared_linear(x, self._weights, self.bias, self.out_features)

    def to_linear(self, dtype: torch.dtype) -> nn.Linear:
        """The same layer as an `nn.Linear` with a dense weight, the rotation folded in."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight = nn.Parameter(dense_weight(*self._stored()).to(dtype), requires_grad=False)
        linear.bias = self.bias
        return linear


class ButterflyHfConfig(QuantizationConfigMixin):
    """`quantization_config` of a butterfly checkpoint, parsed strictly."""

    def __init__(self, **kwargs: Any):
        self.quant_method = QUANT_METHOD
        self.parsed = QuantConfig.from_dict({"quant_method": QUANT_METHOD} | kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The table as config.json holds it."""
        return self.parsed.to_dict()


class ButterflyHfQuantizer(HfQuantizer):
    """Verifies a checkpoint, then puts a `ButterflyLinear` in place of every layer that it stores packed."""

    requires_calibration = True

    def update_tp_plan(self, config):
        """Take out the entry that stops a transformers without this module; files are looked up after this hook."""
        for part in (config, config.get_text_config()):
            if getattr(part, "transformers_weights", None) is not None:
                del part.transformers_weights
        return config

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
        for name, (linear, _) in quantized_layers(model, model.config.model_type, config).items():
            model.set_submodule(name, ButterflyLinear(config, name, linear))
        # float16 values of the format stay exact in a bfloat16 model
        model._keep_in_fp32_modules_strict = {*(model._keep_in_fp32_modules_strict or ()), "scales", "zeros", "angles"}

    def _process_model_after_weight_loading(self, model, **kwargs):
        # with a quantizer transformers leaves tensors that files call otherwise than the model in their stored dtype
        for part in other_parts(model):
            for parameter in model.base_model.get_submodule(part).parameters():
                parameter.data = parameter.data.to(model.get_input_embeddings().weight.dtype)
        return model

    def _dequantize(self, model, dtype=None):
        for name, module in list(model.named_modules()):
            if isinstance(module, ButterflyLinear):
                model.set_submodule(name, module.to_linear(dtype))
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
