"""Quantized linear layers that can be trained: angles, scales and zeros by gradient, codes as latent codes behind a
straight-through quantizer. Up to the dtype of the products they compute the same as the checkpoint.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bq_kernels.format import LARGEST_SCALE, SMALLEST_SCALE, largest_code
from bq_kernels.packing import pack, unpack
from bq_kernels.reference import levels, with_kept_rows, zero_point
from torch import nn

from . import parallel
from .rotation import ButterflyRotation

UNPACKED_ROWS = 8192  # of a weight that is unpacked as a whole
INIT_MARGIN = 0.45  # how far from its stored code, in steps, a latent code may be when training begins


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
        self._fixed: ButterflyRotation | None = None
        self._input = self._rotated = None
        self._remaining = 0  # layers that have not asked for it yet

    def current(self) -> ButterflyRotation:
        """The rotation at the angles that the checkpoint would hold now."""
        if self.angles.requires_grad:
            return ButterflyRotation(as_stored(self.angles, torch.float16), self.block_size)
        if self._fixed is None:
            self._fixed = ButterflyRotation(self.angles.half().float(), self.block_size)
        return self._fixed

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.dtype)
        return x if self.angles is None else self.current().forward(x.flatten(0, -2)).view(x.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Q x in `dtype`, x [..., K]; called once by every layer that shares the input."""
        if torch.compiler.is_compiling():  # the compiler sees by itself that it is the same each time
            return self._rotate(x)
        if self._input is not x:
            self._input, self._rotated, self._remaining = x, self._rotate(x), self.layers
        rotated, self._remaining = self._rotated, self._remaining - 1
        if not self._remaining:  # the backward pass may be about to free it
            self._input = self._rotated = None
        return rotated


def weight_of(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> torch.Tensor:
    """W′ = s·(q − z), float32 [..., N, K].

    Args:
        codes: packed, int32 [..., N, K·bits/32], or latent, float [..., N, groups, group_size], to round.
        scales: float32 [..., N, groups].
        zeros: the same, or None for mid-rise.
        bits: bits per code.
    """
    if codes.is_floating_point():
        codes = codes.float().round().clamp_(0, largest_code(bits))
    else:
        codes = unpack(codes, bits).view(*scales.shape, -1)
    return levels(codes, scales, zeros, bits).flatten(-2)


def level_gradients(
    by_weight: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of scales and zeros, float32 [N, groups], by that of W′ [N, K]; of zeros None where there are none."""
    by_weight = by_weight.view(*scales.shape, -1)
    # q − z is W′/s; where s is 0 so is everything
    by_scale = (by_weight * weight.view_as(by_weight)).sum(-1, dtype=torch.float32) / scales.clamp(min=1e-12)
    return by_scale, None if zeros is None else -by_weight.sum(-1, dtype=torch.float32) * scales


def rounding_gradient(codes: torch.Tensor) -> torch.Tensor | None:
    """Factor on the gradient of every latent code; None is 1: each gets that of the code it rounds to.

    The straight-through estimator of Bengio et al. (arXiv 1308.3432). `benchmarks/training.py` puts others here.
    """
    return None


class QuantLinearFunction(torch.autograd.Function):
    """x W′ᵀ with W′ = s·(q − z).

    Codes are packed or latent, see `weight_of`; the gradient of a latent one is that of the code that it rounds to
    times `rounding_gradient`.
    """

    @staticmethod
    def forward(ctx, x, codes, scales, zeros, bits):
        """y = x W′ᵀ in the dtype of x [..., K]; scales and zeros float32 [N, groups], zeros None for mid-rise."""
        ctx.bits = bits
        weight = weight_of(codes, scales, zeros, bits).to(x.dtype)
        # a second copy of the weight only where its latent codes already take several times as much
        ctx.save_for_backward(x, codes, scales, zeros, weight if codes.requires_grad else None)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient):
        """Gradients of x, latent codes, scales and zeros; W′ is computed again where codes are packed."""
        x, codes, scales, zeros, weight = ctx.saved_tensors
        if weight is None:
            weight = weight_of(codes, scales, zeros, ctx.bits).to(x.dtype)
        by_x = gradient @ weight if ctx.needs_input_grad[0] else None
        by_weight = gradient.flatten(0, -2).T @ x.flatten(0, -2)
        by_code = None
        if ctx.needs_input_grad[1]:
            by_code = (by_weight.view(*scales.shape, -1) * scales.unsqueeze(-1)).to(codes.dtype)
            if (factor := rounding_gradient(codes)) is not None:
                by_code *= factor
        return by_x, by_code, *level_gradients(by_weight, weight, scales, zeros), None


class QuantizedLinear(nn.Module):
    """A linear layer with trainable scales, as ratios to their initial values, and zeros; and codes, given `weight`.

    Codes are trained as latent codes, w/s + z, which the forward pass rounds. A latent code starts at the 16-bit
    weight, but no further than INIT_MARGIN from the code that rounding with error feedback has chosen.

    Args:
        tensors: `qweight`, `scales` and `zeros` of the layer as stored; `kept_tokens` and `kept_rows` of a table.
        bits: bits per code.
        rotation: in front of it.
        bias: or None.
        weight: 16-bit weight [N, K], to train the codes; None freezes them. Not of a table with rows that are kept.
        latent_dtype: of the latent codes.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        bits: int,
        rotation: SharedRotation,
        bias: torch.Tensor | None,
        weight: torch.Tensor | None = None,
        latent_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.bits, self.rotation = bits, rotation
        scales = tensors["scales"].float()
        self.register_buffer("initial_scales", scales)
        self.scale_ratio = nn.Parameter(torch.ones_like(scales))
        self.zeros = nn.Parameter(tensors["zeros"].float()) if "zeros" in tensors else None
        self.bias = bias
        self.register_buffer("kept_tokens", tensors["kept_tokens"].long() if "kept_tokens" in tensors else None)
        self.register_buffer("kept_rows", tensors.get("kept_rows"))
        if weight is None:
            self.register_buffer("codes", tensors["qweight"])
        else:
            codes = unpack(tensors["qweight"], bits).view(*scales.shape, -1)
            self.codes = nn.Parameter(self._latent_codes(codes, weight).to(latent_dtype))

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
            parallel.local(self.codes).clamp_(-0.5, largest_code(self.bits) + 0.5)

    def _scales(self) -> torch.Tensor:
        """Scales in the range that the format allows."""
        return (self.initial_scales * self.scale_ratio).clamp(SMALLEST_SCALE, LARGEST_SCALE)

    def rounded(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scales and zeros as the checkpoint will hold them, float32 [N, groups]; no zeros with mid-rise levels."""
        zeros = None if self.zeros is None else as_stored(self.zeros, torch.float16)
        return as_stored(self._scales(), torch.float16), zeros

    def stored(self) -> dict[str, torch.Tensor]:
        """Codes, scales and zeros as the checkpoint holds them."""
        packed = parallel.whole(self.codes.detach())
        if packed.is_floating_point():
            packed = pack(packed.round().clamp(0, largest_code(self.bits)).to(torch.uint8).flatten(1), self.bits)
        stored = {"qweight": packed, "scales": self._scales().detach().half()}
        if self.kept_tokens is not None:
            stored |= {"kept_tokens": self.kept_tokens.int(), "kept_rows": self.kept_rows}
        return stored | ({} if self.zeros is None else {"zeros": self.zeros.detach().half()})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """W′ Q x + bias in the rotation's dtype, accumulated in float32; x [..., K]."""
        y = QuantLinearFunction.apply(self.rotation(x), self.codes, *self.rounded(), self.bits)
        if self.kept_tokens is not None:
            y = y.index_copy(-1, self.kept_tokens, F.linear(x.to(y.dtype), self.kept_rows.to(y.dtype)))
        return y if self.bias is None else y + self.bias

    def rows(self, numbers: torch.Tensor) -> torch.Tensor:
        """Rows of W = W′ Q, by number int64 [...]: float32 [..., K], differentiable; of packed codes."""
        scales, zeros = (None if values is None else F.embedding(numbers, values) for values in self.rounded())
        rows = weight_of(self.codes[numbers], scales, zeros, self.bits)
        if self.rotation.angles is not None:
            rows = self.rotation.current().inverse(rows.flatten(0, -2)).view_as(rows)
        return with_kept_rows(rows, numbers, self.kept_tokens, self.kept_rows)

    @torch.no_grad()
    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """W′ [N, K] in `dtype`, of packed codes; they are unpacked in float32, some rows at a time. Rows that are kept
        in 16 bits are 0."""
        scales, zeros = self.rounded()
        weight = torch.empty(len(scales), self.codes.shape[1] * 32 // self.bits, dtype=dtype, device=scales.device)
        for start in range(0, len(scales), UNPACKED_ROWS):
            part = slice(start, start + UNPACKED_ROWS)
            weight[part] = weight_of(self.codes[part], scales[part], None if zeros is None else zeros[part], self.bits)
        return weight if self.kept_tokens is None else weight.index_fill_(0, self.kept_tokens, 0)


class QuantizedEmbedding(nn.Module):
    """An embedding of packed rows.

    Args:
        table: its rows; the LM head too, where the two are tied.
        factor: on the rows.
    """

    def __init__(self, table: QuantizedLinear, factor: float):
        super().__init__()
        self.table, self.factor = table, factor

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rows of tokens int64 [...], float32 [..., K]."""
        with torch.autocast(tokens.device.type, enabled=False):
            return self.table.rows(tokens) * self.factor
