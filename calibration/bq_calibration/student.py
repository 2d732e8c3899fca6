"""Quantized layers that can be trained: angles, scales, zeros and norms by gradient, codes through a straight-through
quantizer. What they compute, up to bfloat16 products, is what the checkpoint computes.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from bq_kernels.format import QuantConfig
from bq_kernels.packing import pack, unpack
from bq_kernels.reference import angles_of, levels
from torch import nn
from transformers import AutoModelForCausalLM

from .model import SourceModel, TensorStore
from .rotation import Turn

MARGIN = 0.45  # how far from its stored code, in steps, a weight may be when training begins
# weights a block from which the activations inside blocks are computed again for the backward pass, not kept
RECOMPUTE_FROM = 2**25


def as_stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value` rounded as the checkpoint will hold it; the gradient passes straight through."""
    return value + (value.to(dtype).float() - value).detach()


class Rotation(nn.Module):
    """The rotation in front of the layers that share an input; done once for all of them.

    Args:
        angles: [K/b, num_angles]; None leaves the input as it is.
        block_size: b.
        train: whether the angles are trained.
        layers: how many layers share the input.
    """

    def __init__(self, angles: torch.Tensor | None, block_size: int, train: bool, layers: int):
        super().__init__()
        self.block_size, self.layers = block_size, layers
        self.angles = None if angles is None else nn.Parameter(angles.float(), requires_grad=train)
        self._seen = self._rotated = None
        self._left = 0  # layers that have not asked for it yet

    def turn(self) -> Turn:
        """The rotation at the angles that the checkpoint would hold now."""
        return Turn(as_stored(self.angles, torch.float16), self.block_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Q x in bfloat16, x [..., K]; called once by every layer that shares the input."""
        if self._seen is not x:
            rotated = x.bfloat16()
            if self.angles is not None:
                rotated = self.turn().forward(rotated.flatten(0, -2)).view(x.shape)
            self._seen, self._rotated, self._left = x, rotated, self.layers
        rotated, self._left = self._rotated, self._left - 1
        if not self._left:  # do not hold what the backward pass may be about to free
            self._seen = self._rotated = None
        return rotated


class _Product(torch.autograd.Function):
    """x W′ᵀ with W′ = s·(q − z).

    Codes are packed, int32 [N, K·bits/32], or positions, float32 [N, groups, group], which are rounded and get the
    gradient of the code.
    """

    @staticmethod
    def forward(ctx, x, codes, scales, zeros, bits):
        ctx.bits = bits
        weight = _Product._weight(codes, scales, zeros, bits, x.dtype)
        # a second copy of the weight only where its positions already take several times as much
        ctx.save_for_backward(x, codes, scales, zeros, weight if codes.requires_grad else None)
        return F.linear(x, weight)

    @staticmethod
    def _weight(codes, scales, zeros, bits, dtype):
        if codes.is_floating_point():
            codes = codes.round().clamp_(0, 2**bits - 1)
        else:
            codes = unpack(codes, bits).view(*scales.shape, -1)
        return levels(codes, scales, zeros, bits).flatten(-2).to(dtype)

    @staticmethod
    def backward(ctx, gradient):
        x, codes, scales, zeros, weight = ctx.saved_tensors
        if weight is None:
            weight = _Product._weight(codes, scales, zeros, ctx.bits, x.dtype)
        by_x = gradient @ weight if ctx.needs_input_grad[0] else None
        by_weight = (gradient.flatten(0, -2).T @ x.flatten(0, -2)).view(*scales.shape, -1)
        by_code = by_weight * scales.unsqueeze(-1) if ctx.needs_input_grad[1] else None
        # q − z is W′/s; where s is 0 so is everything
        by_scale = (by_weight * weight.view_as(by_weight)).sum(-1, dtype=torch.float32) / scales.clamp(min=1e-12)
        by_zero = None if zeros is None else -by_weight.sum(-1, dtype=torch.float32) * scales
        return by_x, by_code, by_scale, by_zero, None


class QuantizedLinear(nn.Module):
    """A linear layer with trainable scales, as factors near 1, and zeros; and codes, if `weight` is given.

    Codes are trained as positions on their axis, w/s + z, rounded in the forward pass. A position starts where the
    16-bit weight is, but no further than MARGIN from the code that rounding with error feedback has chosen.

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
        rotation: Rotation,
        bias: torch.Tensor | None,
        weight: torch.Tensor | None = None,
    ):
        super().__init__()
        self.bits, self.rotation = bits, rotation
        scales = tensors["scales"].float()
        self.register_buffer("base", scales)
        self.factor = nn.Parameter(torch.ones_like(scales))
        self.zeros = nn.Parameter(tensors["zeros"].float()) if "zeros" in tensors else None
        self.bias = bias
        if weight is None:
            self.register_buffer("codes", tensors["qweight"])
        else:
            codes = unpack(tensors["qweight"], bits).view(*scales.shape, -1)
            self.codes = nn.Parameter(self._start(codes, weight))

    @torch.no_grad()
    def _start(self, codes: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight = weight.float()
        if self.rotation.angles is not None:
            weight = self.rotation.turn().forward(weight)
        zero = (2**self.bits - 1) / 2 if self.zeros is None else self.zeros.unsqueeze(-1)
        position = weight.view(codes.shape) / self.base.clamp(min=1e-12).unsqueeze(-1) + zero
        return torch.clamp(position, codes - MARGIN, codes + MARGIN)

    @torch.no_grad()
    def hold(self) -> None:
        """Keep positions where a step back changes the code: half a step beyond the outer codes."""
        if self.codes.is_floating_point():
            self.codes.clamp_(-0.5, 2**self.bits - 0.5)

    def stored(self) -> dict[str, torch.Tensor]:
        """Codes, scales and zeros as the checkpoint holds them."""
        packed = self.codes.detach()
        if packed.is_floating_point():
            packed = pack(packed.round().clamp(0, 2**self.bits - 1).to(torch.uint8).flatten(1), self.bits)
        kept = {"qweight": packed, "scales": (self.base * self.factor).detach().half()}
        return kept | ({} if self.zeros is None else {"zeros": self.zeros.detach().half()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W′ Q x + bias in bfloat16, accumulated in float32; x [..., K]."""
        scales = as_stored(self.base * self.factor, torch.float16)
        zeros = None if self.zeros is None else as_stored(self.zeros, torch.float16)
        y = _Product.apply(self.rotation(x), self.codes, scales, zeros, self.bits)
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
    """Decoder blocks made trainable in place.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        train_codes: whether codes are trained too. With position, gradient, two moments, and the rounded weight in
            bfloat16 that takes 18 bytes a weight.
    """

    def __init__(self, source: SourceModel, config: QuantConfig, train_codes: bool):
        self.source, self.config, self.train_codes = source, config, train_codes
        self.layers: dict[str, QuantizedLinear] = {}
        self.rotations: dict[str, Rotation] = {}
        self.norms: dict[str, _Norm] = {}

    def replace_linears(self, block: nn.Module, index: int, packed: TensorStore | dict[str, torch.Tensor]) -> None:
        """Put trainable quantized layers in place of a block's linear ones; `packed` are tensors of the checkpoint."""
        kind, prefix = self.config.rotation.kind, self.source.block_prefix(index)
        for group in self.source.groups:
            first, features = group.layers[0], self.source.linear(block, group.layers[0]).in_features
            block_size = self.config.rotation.block(first)
            stored = packed.get(f"{prefix}{first}.angles") if kind == "butterfly" else None
            angles = angles_of(kind, stored, features, block_size)
            rotation = Rotation(angles, block_size, kind == "butterfly", len(group.layers)).to(self.source.device)
            self.rotations[prefix + first] = rotation
            for name in group.layers:
                linear = self.source.linear(block, name)
                suffixes = self.config.tensors(prefix + name, linear.in_features, linear.out_features)
                tensors = {suffix: packed.get(f"{prefix}{name}.{suffix}").to(self.source.device) for suffix in suffixes}
                weight = None
                if self.train_codes:
                    weight = self.source.store.get(f"{prefix}{name}.weight").to(self.source.device)
                layer = QuantizedLinear(tensors, self.config.bits_of(prefix + name), rotation, linear.bias, weight)
                block.set_submodule(name, layer.to(self.source.device))
                self.layers[prefix + name] = layer

    def replace_norms(self, module: nn.Module, prefix: str) -> None:
        """Put trainable norms in place of those inside `module`, whose name in the checkpoint starts with `prefix`."""
        for name, norm in list(module.named_modules()):
            if name.endswith("norm") and isinstance(getattr(norm, "weight", None), nn.Parameter):
                dtype = self.source.store.get(f"{prefix}{name}.weight").dtype
                self.norms[prefix + name] = _Norm(norm, dtype)
                module.set_submodule(name, self.norms[prefix + name])

    def hold(self) -> None:
        """Keep the positions of all codes in range."""
        for layer in self.layers.values():
            layer.hold()

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, by kind."""
        found = {
            "codes": [layer.codes for layer in self.layers.values()],
            "factors": [layer.factor for layer in self.layers.values()],
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
        with init_empty_weights(include_buffers=False):
            self.model = AutoModelForCausalLM.from_config(source.config, dtype=torch.float32)
        kept = {
            name: (packed if name in packed else source.store).get(name).float()
            for name in self.model.state_dict()
            if name in source.store and not self._is_packed(name)
        }
        self.model.load_state_dict(kept, assign=True, strict=False)
        self.model.tie_weights()
        self.model.requires_grad_(False)
        blocks, names = self.model.model.layers, [name for group in source.groups for name in group.layers]
        if sum(source.linear(blocks[0], name).weight.numel() for name in names) >= RECOMPUTE_FROM:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        for index, block in enumerate(blocks):
            self.replace_linears(block, index, packed)
        self.replace_norms(self.model, "")
        self.model.to(source.device).train()
        self.head = copy.deepcopy(self.model.lm_head).to(torch.bfloat16)  # apart from an embedding that it is tied to

    def _is_packed(self, name: str) -> bool:
        return name.startswith("model.layers.") and any(
            name.endswith(layer + ".weight") for group in self.source.groups for layer in group.layers
        )

    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """What enters the LM head, [samples, seqlen, hidden]."""
        with torch.autocast(self.source.device.type, torch.bfloat16):
            return self.model.model(input_ids=tokens, use_cache=False).last_hidden_state

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Float32 logits of states, by the LM head that both models share."""
        return self.head(states.bfloat16()).float()
