"""Weights and inputs of the layers on which rotations are learned."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from bq_calibration.block import Block
from bq_calibration.input_statistics import InputStatistics
from bq_calibration.model import SourceModel
from bq_calibration.rotation import MOST_ROWS
from bq_calibration.sampling import spread_rows
from rich.progress import Progress


@dataclass
class LayerStats:
    """The linear layers of a decoder block that share an input.

    Attributes:
        name: block and layers.
        weight: float32 [N, K], the layers stacked.
        hessians: float32 [K, K], mean of x xᵀ over the first so many windows, by that number.
        held_out: the same over windows that no setting sees.
        inputs: float32 [tokens, K], for the uniformity term.
    """

    name: str
    weight: torch.Tensor
    hessians: dict[int, torch.Tensor]
    held_out: torch.Tensor
    inputs: torch.Tensor


def _hessians(parts: list[InputStatistics], ends: list[int]) -> dict[int, torch.Tensor]:
    """Mean of x xᵀ over all windows up to each end, from statistics of the windows in between."""
    means, total, tokens = {}, torch.zeros_like(parts[0].hessian), 0
    for end, part in zip(ends, parts, strict=True):
        total, tokens = total + part.hessian * part.tokens, tokens + part.tokens
        means[end] = total / tokens
    return means


@torch.no_grad()
def _observe(block: Block, hidden: torch.Tensor, ends: list[int]) -> Iterator[LayerStats]:
    """Run a block in place and yield the statistics of its layers."""
    parts = []
    for start, end in zip([0, *ends], [*ends, len(hidden)], strict=True):
        with block.observe() as seen:
            block.run(hidden[start:end], out=hidden[start:end])
        parts.append(seen)
    for group in block.groups:
        *calibration, held_out = (part[group] for part in parts)
        yield LayerStats(
            f"block {block.index}, {group.name}",
            block.weight(group),
            _hessians(calibration, ends),
            held_out.hessian,
            spread_rows(calibration[0].sample, MOST_ROWS // 4),
        )


def layer_stats(
    source: SourceModel, tokens: torch.Tensor, ends: list[int], blocks: list[int], progress: Progress
) -> Iterator[LayerStats]:
    """Statistics of the layers of some decoder blocks of the 16-bit model, one group after the other.

    Args:
        source: the 16-bit model.
        tokens: int64 [windows, seqlen].
        ends: how many windows each Hessian is of, rising; windows after the last are held out.
        blocks: indices.
        progress: shows a bar.
    """
    hidden = source.embed(tokens)
    task = progress.add_task("inputs", total=max(blocks) + 1)
    for index in range(max(blocks) + 1):
        with source.block(index) as block:
            if index in blocks:
                yield from _observe(block, hidden, ends)
            else:
                block.run(hidden, out=hidden)
        progress.advance(task)
