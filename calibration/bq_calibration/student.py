"""Quantized layers that can be trained: angles, scales, zeros and norms by gradient, codes as latent codes behind a
straight-through quantizer. Up to the dtype of the products they compute the same as the checkpoint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bq_kernels.format import LARGEST_SCALE, SMALLEST_SCALE, QuantConfig, largest_code
from bq_kernels.packing import pack, unpack
from bq_kernels.reference import angles_of, levels, zero_point
from torch import nn

from .block import Block
from .model import SourceModel
from .rotation import ButterflyRotation
from .skeleton import empty_model
from .store import TensorStore

INIT_MARGIN = 0.45  # how far from its stored code, in steps, a latent code may be when training begins
# weights per decoder layer from which activations inside layers are computed again for the backward pass, not kept
RECOMPUTE_FROM = 2**25


def as_stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value` rounded as the checkpoint will hold it; the gradient passes straight through."""
    return value + (value.to(dtype).float() - value).detach()


class SharedRotation(nn.Module):
    """The rotation in front of the layers that share an input, computed once for all of them.

    Args:
        angles: [K/b, num_angles]; None leaves the input as it is.
        block_size: b.
        train: whether the angles are trained.
        layers: how many layers share the input.
        dtype: of the rotated input.
    """

    def __init__(self, angles: torch.Tensor | None, block_size: int, train: bool, layers: int, dtype: torch.dtype):
        super().__init__()
        self.block_size, self.layers, self.dtype = block_size, layers, dtype
        self.angles = None if angles is None else nn.Parameter(angles.float(), requires_grad=train)
        self._input = self._rotated = None
        self._remaining = 0  # layers that have not asked for it yet

    def current(self) -> ButterflyRotation:
        """The rotation at the angles that the checkpoint would hold now."""
        return ButterflyRotation(as_stored(self.angles, torch.float16), self.block_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Q x in `dtype`, x [..., K]; called once by every layer that shares the input."""
        if self._input is not x:
            rotated = x.to(self.dtype)
            if self.angles is not None:
                rotated = self.current().forward(rotated.flatten(0, -2)).view(x.shape)
            self._input, self._rotated, self._remaining = x, rotated, self.layers
        rotated, self._remaining = self._rotated, self._remaining - 1
        if not self._remaining:  # the backward pass may be about to free it
            self._input = self._rotated = None
        return rotated


class QuantLinearFunction(torch.autograd.Function):
    """x W′ᵀ with W′ = s·(q − z).

    Codes are packed, int32 [N, K·bits/32], or latent, float32 [N, groups, group_size]; latent ones are rounded and get
    the gradient of the code that they round to (straight-through).
    """

    @staticmethod
    def forward(ctx, x, codes, scales, zeros, bits):
        """y = x W′ᵀ in the dtype of x [..., K]; scales and zeros float32 [N, groups], zeros None for mid-rise."""
        ctx.bits = bits
        weight = QuantLinearFunction._weight(codes, scales, zeros, bits, x.dtype)
        # a second copy of the weight only where its latent codes already take several times as much
        ctx.save_for_backward(x, codes, scales, zeros, weight if codes.requires_grad else None)
        return F.linear(x, weight)

    @staticmethod
    def _weight(codes, scales, zeros, bits, dtype):
        if codes.is_floating_point():
            codes = codes.round().clamp_(0, largest_code(bits))
        else:
            codes = unpack(codes, bits).view(*scales.shape, -1)
        return levels(codes, scales, zeros, bits).flatten(-2).to(dtype)

    @staticmethod
    def backward(ctx, gradient):
        """Gradients of x, latent codes, scales and zeros; W′ is computed again where codes are packed."""
        x, codes, scales, zeros, weight = ctx.saved_tensors
        if weight is None:
            weight = QuantLinearFunction._weight(codes, scales, zeros, ctx.bits, x.dtype)
        by_x = gradient @ weight if ctx.needs_input_grad[0] else None
        by_weight = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).view(*scales.shape, -1)
        by_code = by_weight * scales.unsqueeze(-1) if ctx.needs_input_grad[1] else None
        # q − z is W′/s; where s is 0 so is everything
        by_scale = (by_weight * weight.view_as(by_weight)).sum(-1, dtype=torch.float32) / scales.clamp(min=1e-12)
        by_zero = None if zeros is None else -by_weight.sum(-1, dtype=torch.float32) * scales
        return by_x, by_code, by_scale, by_zero, None


class QuantizedLinear(nn.Module):
    """A linear layer with trainable scales, as ratios to their initial values, and zeros; and codes, given `weight`.

    Codes are trained as latent codes, w/s + z, which the forward pass rounds. A latent code starts at the 16-bit
    weight, but no further than INIT_MARGIN from the code that rounding with error feedback has chosen.

    Args:
        tensors: `qweight`, `scales` and `zeros` of the layer as stored.
        bits: bits per code.
        rotation: in front of it.
        bias: or None.
        weight: 16-bit weight [N, K], to train the codes; None freezes them.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        bits: int,
        rotation: SharedRotation,
        bias: torch.Tensor | None,
        weight: torch.Tensor | None = None,
    ):
        super().__init__()
        self.bits, self.rotation = bits, rotation
        scales = tensors["scales"].float()
        self.register_buffer("initial_scales", scales)
        self.scale_ratio = nn.Parameter(torch.ones_like(scales))
        self.zeros = nn.Parameter(tensors["zeros"].float()) if "zeros" in tensors else None
        self.bias = bias
        if weight is None:
            self.register_buffer("codes", tensors["qweight"])
        else:
            codes = unpack(tensors["qweight"], bits).view(*scales.shape, -1)
            self.codes = nn.Parameter(self._latent_codes(codes, weight))

    @torch.no_grad()
    def _latent_codes(self, codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.float()
        if self.rotation.angles is not None:
            weight = self.rotation.current().forward(weight)
        steps = weight.view(codes.shape) / self.initial_scales.clamp(min=1e-12).unsqueeze(-1)
        latent = steps + zero_point(self.zeros, self.bits)
        return torch.clamp(latent, codes - INIT_MARGIN, codes + INIT_MARGIN)

    @torch.no_grad()
    def clamp_codes(self) -> None:
        """Keep latent codes where one step back changes the code: half a step beyond the outer codes."""
        if self.codes.is_floating_point():
            self.codes.clamp_(-0.5, largest_code(self.bits) + 0.5)

    def _scales(self) -> torch.Tensor:
        """Scales in the range that the format allows."""
        return (self.initial_scales * self.scale_ratio).clamp(SMALLEST_SCALE, LARGEST_SCALE)

    def stored(self) -> dict[str, torch.Tensor]:
        """Codes, scales and zeros as the checkpoint holds them."""
        packed = self.codes.detach()
        if packed.is_floating_point():
            packed = pack(packed.round().clamp(0, largest_code(self.bits)).to(torch.uint8).flatten(1), self.bits)
        kept = {"qweight": packed, "scales": self._scales().detach().half()}
        return kept | ({} if self.zeros is None else {"zeros": self.zeros.detach().half()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W′ Q x + bias in the rotation's dtype, accumulated in float32; x [..., K]."""
        scales = as_stored(self._scales(), torch.float16)
        zeros = None if self.zeros is None else as_stored(self.zeros, torch.float16)
        y = QuantLinearFunction.apply(self.rotation(x), self.codes, scales, zeros, self.bits)
        return y if self.bias is None else y + self.bias


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
        train_codes: whether codes are trained too. Latent code, gradient, two moments and the rounded weight in
            bfloat16 take 18 bytes per weight.
    """

    def __init__(self, source: SourceModel, config: QuantConfig, train_codes: bool):
        self.source, self.config, self.train_codes = source, config, train_codes
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
            rotation = SharedRotation(angles, block_size, trained, len(group.layers), dtype).to(device)
            self.rotations[prefix + first] = rotation
            for name, linear in block.linears(group).items():
                suffixes = self.config.tensors(prefix + name, linear.in_features, linear.out_features)
                tensors = {suffix: packed.get(f"{prefix}{name}.{suffix}").to(device) for suffix in suffixes}
                weight = None
                if self.train_codes:
                    weight = self.source.store.get(f"{prefix}{name}.weight").to(device)
                layer = QuantizedLinear(tensors, self.config.bits_of(prefix + name), rotation, linear.bias, weight)
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
    """The quantized model, whole and trainable.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        packed: tensors of the quantized layers, and of norms that training has changed.
        train_codes: see `Trainable`.
    """

    def __init__(self, source: SourceModel, config: QuantConfig, packed: TensorStore, train_codes: bool = False):
        super().__init__(source, config, train_codes)
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
        if sum(linear.weight.numel() for linear in blocks[0].linears().values()) >= RECOMPUTE_FROM:
            self.decoder.gradient_checkpointing_enable({"use_reentrant": False})
        for block in blocks:
            self.replace_linears(block, packed)
        self.replace_norms(self.decoder, prefix)
        self.decoder.to(source.device).train()
        # a tensor of its own, so that an embedding which it is tied to stays float32
        head = {name: source.store.get(source.head_prefix + name) for name in self.head.state_dict()}
        self.head.load_state_dict({name: t.to(source.training_dtype) for name, t in head.items()}, assign=True)
        self.head.requires_grad_(False).to(source.device)

    def _is_packed(self, name: str) -> bool:
        return name.startswith(f"{self.source.decoder_name}.layers.") and any(
            name.endswith(layer + ".weight") for group in self.source.groups for layer in group.layers
        )

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states in front of the LM head, [samples, seqlen, hidden]."""
        with self.autocast():
            return self.decoder(input_ids=tokens, use_cache=False).last_hidden_state

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Float32 logits of hidden states, by the LM head that both models share."""
        return self.head(states.to(self.source.training_dtype)).float()
