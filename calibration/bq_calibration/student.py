"""Decoder layers and whole models of quantized layers that are trained, and the 16-bit model beside them."""

from __future__ import annotations

import logging

import torch
from bq_kernels.format import KEPT, QuantConfig
from bq_kernels.reference import angles_of
from torch import nn

from . import parallel
from .block import Block
from .model import SourceModel
from .quantized_linear import QuantizedEmbedding, QuantizedLinear, SharedRotation, as_stored
from .skeleton import empty_model
from .store import TensorStore

logger = logging.getLogger(__name__)
Packed = TensorStore | dict[str, torch.Tensor]  # tensors of a checkpoint, by full name
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

    def _rotation(self, name: str, features: int, layers: int, packed: Packed) -> SharedRotation:
        """The rotation in front of `layers` layers, of which `name` is the first."""
        kind, block_size = self.config.rotation.kind, self.config.rotation.block(name)
        stored = packed.get(f"{name}.angles") if kind == "butterfly" else None
        angles = angles_of(kind, stored, features, block_size)
        trained, dtype = kind == "butterfly", self.source.training_dtype
        rotation = SharedRotation(angles, block_size, trained, layers, dtype).to(self.source.device)
        self.rotations[name] = rotation
        return rotation

    def _layer(
        self,
        name: str,
        rotation: SharedRotation,
        bias: torch.Tensor | None,
        packed: Packed,
        weight: torch.Tensor | None = None,
    ) -> QuantizedLinear:
        """The trainable layer of a full name; `weight` trains its codes."""
        zeros = ("zeros",) if self.config.zero_point == "float" else ()
        suffixes = ("qweight", "scales", *zeros, *(KEPT if name in self.config.kept_tokens else ()))
        tensors = {suffix: packed.get(f"{name}.{suffix}").to(self.source.device) for suffix in suffixes}
        layer = QuantizedLinear(tensors, self.config.bits_of(name), rotation, bias, weight, self.latent_dtype)
        self.layers[name] = layer.to(self.source.device)
        return self.layers[name]

    def replace_linears(self, block: Block, packed: Packed) -> None:
        """Put trainable quantized layers in place of a block's linear ones; `packed` are tensors of the checkpoint."""
        for group in block.groups:
            features, count = block.in_features(group), len(group.parts()[0].layers)
            rotation = self._rotation(block.prefix + group.layers[0], features, count, packed)
            for name, linear in block.linears(group).items():
                full, weight = block.prefix + name, None
                if self.train_codes:
                    weight = self.source.store.get(f"{full}.weight").to(self.source.device)
                block.module.set_submodule(name, self._layer(full, rotation, linear.bias, packed, weight))

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
        """The trained parameters, by kind; `tables` are scales and zeros of an embedding and LM head."""
        names = self.source.embedding_names
        layers = [layer for name, layer in self.layers.items() if name not in names]
        tables = [layer for name, layer in self.layers.items() if name in names]
        found = {
            "codes": [layer.codes for layer in self.layers.values()],
            "scales": [layer.scale_ratio for layer in layers],
            "zeros": [layer.zeros for layer in layers if layer.zeros is not None],
            "tables": [p for table in tables for p in (table.scale_ratio, table.zeros) if p is not None],
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

    Codes of a packed embedding and LM head are never trained; where the two are tied they are one table.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        packed: tensors of all that is packed, and of norms that training has changed.
        train_codes: see `Trainable`.
        latent_dtype: see `Trainable`.
        recompute: whether activations inside decoder layers are computed again for the backward pass, not kept.

    Attributes:
        decoder: without the LM head.
        original_head: the LM head of the 16-bit model, in the training dtype.
        head: the student's own: packed, or that one.
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
        self.decoder, self.original_head = model.get_submodule(source.decoder_name), model.lm_head
        names = {name: prefix + name for name in self.decoder.state_dict() if not self._is_packed(prefix + name)}
        kept = {name: (packed if full in packed else source.store).get(full) for name, full in names.items()}
        self.decoder.load_state_dict({name: t.float() for name, t in kept.items()}, assign=True, strict=False)
        self.decoder.requires_grad_(False)
        blocks = [
            Block(index, source.block_prefix(index), layer, source.groups[index], {})
            for index, layer in enumerate(self.decoder.layers)
        ]
        if recompute:
            self.decoder.gradient_checkpointing_enable({"use_reentrant": False})
        for block in blocks:
            self.replace_linears(block, packed)
            self._shard(block.module)  # at once, so that one layer's codes are whole at a time
        # a tensor of its own, so that an embedding which it is tied to stays float32
        head = {name: source.store.get(source.head_prefix + name) for name in self.original_head.state_dict()}
        head = {name: tensor.to(source.training_dtype) for name, tensor in head.items()}
        self.original_head.load_state_dict(head, assign=True)
        self.original_head.requires_grad_(False).to(source.device)
        self.head = self._replace_embeddings(packed)
        self.replace_norms(self.decoder, prefix)
        self.decoder.to(source.device).train()
        self._shard(self.decoder)

    def _replace_embeddings(self, packed: TensorStore) -> nn.Linear | QuantizedLinear:
        """Put a packed embedding in its place; returns the LM head."""
        tables, features = {}, self.source.text_config.hidden_size
        for name in filter(self.config.packs, self.source.embedding_names):
            tables[name] = self._layer(name, self._rotation(name, features, 1, packed), self.original_head.bias, packed)
        if embedding := tables.get(self.source.embedding_names[0]):
            factor = getattr(self.decoder.embed_tokens, "scalar_embed_scale", 1.0)
            self.decoder.embed_tokens = QuantizedEmbedding(embedding, factor)
        return tables.get(self.source.embedding_names[-1], self.original_head)

    def _is_packed(self, name: str) -> bool:
        return self.config.packs(name.removesuffix(".weight")) or name in self.source.linear_weights

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
        """Logits of hidden states in the training dtype."""
        return self.head(states.to(self.source.training_dtype))
