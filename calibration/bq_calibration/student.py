"""Decoder layers and whole models of quantized layers that are trained, and the 16-bit model beside them."""

from __future__ import annotations

import logging

import torch
from bq_kernels.format import QuantConfig
from bq_kernels.reference import angles_of
from torch import nn

from . import parallel
from .block import Block
from .model import SourceModel
from .quantized_linear import QuantizedLinear, SharedRotation, as_stored
from .skeleton import empty_model
from .store import TensorStore

logger = logging.getLogger(__name__)
COMPILED_ERROR = 0.05  # of the states, relative; rounding in bfloat16 gives about a fifth of it


class _Norm(nn.Module):
    """A norm whose weight is trained and rounded as the checkpoint will hold it."""

    def __init__(self, norm: nn.Module, dtype: torch.dtype):
        super().__init__()
        self.norm, self.dtype = norm, dtype
        self.weight = nn.Parameter(norm.weight.detach().float().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = as_stored(self.weight, self.dtype)
        return torch.func.functional_call(self.norm, {"weight": weight}, (x,))


class Trainable:
    """Decoder layers made trainable in place.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        train_codes: whether codes are trained too.
        latent_dtype: of the latent codes.
    """

    def __init__(
        self,
        source: SourceModel,
        config: QuantConfig,
        train_codes: bool,
        latent_dtype: torch.dtype = torch.float32,
    ):
        self.source, self.config, self.train_codes = source, config, train_codes
        self.latent_dtype = latent_dtype
        self.layers: dict[str, QuantizedLinear] = {}
        self.rotations: dict[str, SharedRotation] = {}
        self.norms: dict[str, _Norm] = {}

    def autocast(self) -> torch.autocast:
        """Context in which products are computed in the run's training dtype."""
        dtype = self.source.training_dtype
        return torch.autocast(self.source.device.type, dtype, enabled=dtype != torch.float32)

    def replace_linears(self, block: Block, packed: TensorStore | dict[str, torch.Tensor]) -> None:
        """Put trainable quantized layers in place of a block's linear ones; `packed` are tensors of the checkpoint."""
        kind, prefix, device = self.config.rotation.kind, block.prefix, self.source.device
        for group in block.groups:
            first, block_size = group.layers[0], self.config.rotation.block(group.layers[0])
            stored = packed.get(f"{prefix}{first}.angles") if kind == "butterfly" else None
            angles = angles_of(kind, stored, block.in_features(group), block_size)
            trained, dtype = kind == "butterfly", self.source.training_dtype
            rotation = SharedRotation(angles, block_size, trained, len(group.parts()[0].layers), dtype).to(device)
            self.rotations[prefix + first] = rotation
            for name, linear in block.linears(group).items():
                suffixes = self.config.tensors(prefix + name, linear.in_features, linear.out_features)
                tensors = {suffix: packed.get(f"{prefix}{name}.{suffix}").to(device) for suffix in suffixes}
                weight = None
                if self.train_codes:
                    weight = self.source.store.get(f"{prefix}{name}.weight").to(device)
                bits = self.config.bits_of(prefix + name)
                layer = QuantizedLinear(tensors, bits, rotation, linear.bias, weight, self.latent_dtype)
                block.module.set_submodule(name, layer.to(device))
                self.layers[prefix + name] = layer

    def replace_norms(self, module: nn.Module, prefix: str) -> None:
        """Put trainable norms in place of those inside `module`, whose name in the checkpoint starts with `prefix`."""
        for name, norm in list(module.named_modules()):
            if name.endswith("norm") and isinstance(getattr(norm, "weight", None), nn.Parameter):
                dtype = self.source.kept_dtype(f"{prefix}{name}.weight")
                self.norms[prefix + name] = _Norm(norm, dtype)
                module.set_submodule(name, self.norms[prefix + name])

    def clamp_codes(self) -> None:
        """Keep the latent codes of all layers in range."""
        for layer in self.layers.values():
            layer.clamp_codes()

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """The trained parameters, by kind."""
        found = {
            "codes": [layer.codes for layer in self.layers.values()],
            "scales": [layer.scale_ratio for layer in self.layers.values()],
            "zeros": [layer.zeros for layer in self.layers.values() if layer.zeros is not None],
            "angles": [rotation.angles for rotation in self.rotations.values() if rotation.angles is not None],
            "norms": [norm.weight for norm in self.norms.values()],
        }
        return {kind: [p for p in values if p.requires_grad] for kind, values in found.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor of the checkpoint that training can have changed."""
        found: dict[str, torch.Tensor] = {}
        for name, layer in self.layers.items():
            stored = layer.stored()
            if self.config.rotation.kind == "butterfly":
                stored["angles"] = layer.rotation.angles.detach().half()
            found |= {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}
        found |= {f"{name}.weight": norm.weight.detach().to(norm.dtype) for name, norm in self.norms.items()}
        return {name: tensor.cpu().contiguous().clone() for name, tensor in found.items()}


class Student(Trainable):
    """The quantized model, whole and trainable. Codes that are trained are sharded over the processes.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        packed: tensors of the quantized layers, and of norms that training has changed.
        train_codes: see `Trainable`.
        latent_dtype: see `Trainable`.
        recompute: whether activations inside decoder layers are computed again for the backward pass, not kept.
    """

    def __init__(
        self,
        source: SourceModel,
        config: QuantConfig,
        packed: TensorStore,
        train_codes: bool = False,
        latent_dtype: torch.dtype = torch.float32,
        recompute: bool = False,
    ):
        super().__init__(source, config, train_codes, latent_dtype)
        model, prefix = empty_model(source.config, torch.float32), f"{source.decoder_name}."
        self.decoder, self.head = model.get_submodule(source.decoder_name), model.lm_head
        names = {name: prefix + name for name in self.decoder.state_dict() if not self._is_packed(prefix + name)}
        kept = {name: (packed if full in packed else source.store).get(full) for name, full in names.items()}
        self.decoder.load_state_dict({name: t.float() for name, t in kept.items()}, assign=True, strict=False)
        self.decoder.requires_grad_(False)
        blocks = [
            Block(index, source.block_prefix(index), layer, source.groups, {})
            for index, layer in enumerate(self.decoder.layers)
        ]
        if recompute:
            self.decoder.gradient_checkpointing_enable({"use_reentrant": False})
        for block in blocks:
            self.replace_linears(block, packed)
            self._shard(block.module)  # at once, so that one layer's codes are whole at a time
        self.replace_norms(self.decoder, prefix)
        self.decoder.to(source.device).train()
        self._shard(self.decoder)
        # a tensor of its own, so that an embedding which it is tied to stays float32
        head = {name: source.store.get(source.head_prefix + name) for name in self.head.state_dict()}
        self.head.load_state_dict({name: t.to(source.training_dtype) for name, t in head.items()}, assign=True)
        self.head.requires_grad_(False).to(source.device)

    def _is_packed(self, name: str) -> bool:
        return name.startswith(f"{self.source.decoder_name}.layers.") and any(
            name.endswith(layer + ".weight") for group in self.source.groups for layer in group.layers
        )

    def _shard(self, module: nn.Module) -> None:
        if self.train_codes and parallel.size() > 1:
            layers = (layer for layer in module.modules() if isinstance(layer, QuantizedLinear))
            codes = [] if module is self.decoder else [layer.codes for layer in layers]
            parallel.shard(module, codes, self.source.device)

    def compile(self, tokens: torch.Tensor) -> bool:
        """Compile every decoder layer.

        Args:
            tokens: int64 [samples, seqlen], to try it on; of the shape of later calls.

        Returns:
            whether that works and gives the states of the eager layers. If not, a log line says why, and the student
            is spoilt: where a pass ends in the middle, sharded codes stay gathered.
        """
        with torch.no_grad():
            eager = self.states(tokens)
        for layer in self.decoder.layers:
            layer.compile(dynamic=False)
        try:
            compiled = self.states(tokens)
            compiled.sum().backward()
            error = ((compiled.detach() - eager).norm() / eager.norm()).item()
            if not error < COMPILED_ERROR:
                raise RuntimeError(f"the compiled layers are off by {error:.1e}")
        except Exception as error:  # whatever a compiler raises: the eager layers are always right
            logger.warning("decoder layers are not compiled: %s", " ".join(str(error).split())[:300])
            return False
        for parameters in self.parameters().values():
            for parameter in parameters:
                parameter.grad = None
        return True

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states in front of the LM head, [samples, seqlen, hidden]."""
        with self.autocast():
            return self.decoder(input_ids=tokens, use_cache=False).last_hidden_state

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Logits of hidden states in the training dtype, by the LM head that both models share."""
        return self.head(states.to(self.source.training_dtype))
