"""Linear layers of a packed model whose input is rounded to int8: simulated, all products are in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from bq_calibration.packed_modules import ButterflyLinear
from bq_kernels.activations import round_to_int8
from bq_kernels.reference import angles_of, apply_rotation, dequantize, givens_tables
from torch import nn

PLACES = ("", "in front of the rotation", "behind the rotation")  # the first: activations stay as they are


def rounded(x: torch.Tensor, columns: int | None) -> torch.Tensor:
    """x [..., K] rounded to int8 with one scale per token, or per token and `columns` columns."""
    rows = x if columns is None else x.unflatten(-1, (-1, columns))
    codes, scale = round_to_int8(rows)
    return (codes * scale).reshape(x.shape).to(x.dtype)


def block_matrices(angles: torch.Tensor, block_size: int) -> torch.Tensor:
    """The rotation's blocks as matrices, float32 [K/b, b, b]: on a CPU one product is faster than many butterflies."""
    columns = torch.eye(block_size).repeat(1, len(angles))  # row i: feature i of every block is 1
    return apply_rotation(columns, *givens_tables(angles, block_size)).unflatten(-1, (-1, block_size)).permute(1, 2, 0)


class RoundingLinear(nn.Module):
    """A packed layer with dense weights in the rotated basis, which rounds its input where it is told to.

    Args:
        packed: the layer.

    Attributes:
        place: one of PLACES.
        columns: features that share a scale; None: all of a token.
    """

    def __init__(self, packed: ButterflyLinear):
        super().__init__()
        self.place, self.columns, self.bias = "", None, packed.bias
        self.weight = dequantize(packed.qweight, packed.scales, packed.zeros, packed.in_features)
        angles = angles_of(packed.kind, packed.angles, packed.in_features, packed.block_size)
        self.blocks = None if angles is None else block_matrices(angles, packed.block_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y = W′ (Q x) + bias for x [..., K] in float32."""
        if self.place == PLACES[1]:
            x = rounded(x, self.columns)
        if self.blocks is not None:
            x = torch.einsum("...bi,bji->...bj", x.unflatten(-1, (len(self.blocks), -1)), self.blocks).flatten(-2)
        if self.place == PLACES[2]:
            x = rounded(x, self.columns)
        return F.linear(x, self.weight, self.bias)


def replace_layers(model: nn.Module) -> list[RoundingLinear]:
    """Put a `RoundingLinear` in place of every packed layer of a model; returns them."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, ButterflyLinear)}
    layers = {name: RoundingLinear(module) for name, module in found.items()}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return list(layers.values())
