"""AWQ (arXiv 2306.00978): searched scales of the input channels, folded into what comes before, and clipping.

python -m benchmarks.baselines.awq MODEL -o OUT --tokens tokens.safetensors [--bits 2] [--levels minmax]
"""

from __future__ import annotations

import math

import torch
import typer
from bq_calibration.block import Block
from bq_calibration.quantize import Quantized, output_error, search_scale

from benchmarks.baselines.levels import MIDRISE, Levels, LevelsOption
from benchmarks.baselines.stream import PRECEDING, Run
from benchmarks.baselines.third_party.packages import Bits, GroupSize, Model, Out, Tokens

RATIOS = [n / 20 for n in range(20)]  # AWQ's grid of exponents
SHARES = [1 - n / 20 for n in range(10)]  # and of clipping
UNCLIPPED = ("q_proj", "k_proj")  # as published

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def round_clipped(w: torch.Tensor, hessian: torch.Tensor, levels: Levels, shares: list[float]) -> Quantized:
    """Round to nearest with the clipping that changes a group's share of the output least.

    With mid-rise levels the search is `search_scale`'s, weighted by the input's size; else it is AWQ's.

    Args:
        w: float32 [N, K].
        hessian: float32 [K, K], mean of x xᵀ.
        levels: to round to.
        shares: of a group's range, that are tried.
    """
    grouped = levels.grouped(w)
    groups, group = grouped.shape[1:]
    if levels.kind == MIDRISE:
        importance = hessian.diagonal().view(groups, group)
        return levels.quantized(grouped, *search_scale(grouped, levels.bits, MIDRISE, importance))
    local = hessian.view(groups, group, groups, group).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [groups, g, g]
    best = w.new_full(grouped.shape[:2], torch.inf)
    scales, zeros = torch.zeros_like(best), torch.zeros_like(best)
    for share in shares:
        scale, zero = levels.clipped_range(grouped, share, share)
        delta = levels.quantized(grouped, scale, zero).weight().view_as(grouped) - grouped
        error = (torch.einsum("ngk,gkj->ngj", delta, local) * delta).sum(-1)
        better = error < best
        best, scales = torch.where(better, error, best), torch.where(better, scale, scales)
        zeros = torch.where(better, zero, zeros)
    return levels.quantized(grouped, scales, zeros)


def _best_scale(weight: torch.Tensor, hessian: torch.Tensor, size: torch.Tensor, levels: Levels) -> torch.Tensor:
    """The scale of the input channels with the least output error: their mean magnitude to a power, from a grid."""
    least, best = math.inf, torch.ones_like(size)
    for ratio in RATIOS:
        scale = size.clamp(min=1e-4) ** ratio
        scale /= (scale.max() * scale.min()).sqrt()
        scaled, scaled_hessian = weight * scale, hessian / scale / scale[:, None]
        rounded = round_clipped(scaled, scaled_hessian, levels, [1.0]).weight()
        error = output_error(scaled, rounded, scaled_hessian)
        if error < least:
            least, best = error, scale
    return best


def quantize_block(block: Block, hidden: torch.Tensor, levels: Levels) -> None:
    """AWQ of one decoder block; as published, the input of o_proj stays unscaled where heads share values.

    Args:
        block: left quantized.
        hidden: its inputs, [samples, seqlen, hidden].
        levels: to round to.
    """
    with block.observe() as inputs:
        block.run(hidden)
    for group, seen in inputs.items():
        hessian, size = seen.hessian, seen.mean_abs
        before = block.module.get_submodule(PRECEDING[group.layers[0]])
        foldable = len(before.weight) == len(size)
        scale = _best_scale(block.weight(group), hessian, size, levels) if foldable else torch.ones_like(size)
        scaled_hessian = hessian / scale / scale[:, None]
        for name in group.layers:
            shares = SHARES[:1] if name.endswith(UNCLIPPED) else SHARES
            weight = block.linear(name).weight.float() * scale
            block.set_weight(name, round_clipped(weight, scaled_hessian, levels, shares).weight())
        # rows of a layer that is quantized already stay on its levels: their scales change
        for tensor in before.parameters() if foldable else []:
            tensor.data = (tensor / scale.view(-1, *[1] * (tensor.dim() - 1))).to(tensor.dtype)


@app.command(help=__doc__)
def main(
    model: Model, out: Out, tokens: Tokens, bits: Bits = 2, group_size: GroupSize = 64, levels: LevelsOption = MIDRISE
) -> None:
    """Quantize a model by AWQ and write it."""
    grid = Levels(bits, group_size, levels)
    Run("AWQ", model, out, tokens, grid).run(lambda *_: lambda block, hidden, _: quantize_block(block, hidden, grid))


if __name__ == "__main__":
    app()
