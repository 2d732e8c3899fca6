"""All decoder layers, one after the other: each is quantized, perhaps trained, and kept in the workspace."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from bq_kernels.format import QuantConfig
from rich.progress import Progress

from . import parallel
from .block import Block, Original
from .model import SourceModel
from .quantize_block import quantize_block
from .recipes import Recipe
from .reconstruct import reconstruct
from .workspace import Workspace

logger = logging.getLogger(__name__)
BLOCKS = "blocks"  # folder of the workspace with the tensors and reports of finished layers


def quantize_blocks(
    source: SourceModel,
    config: QuantConfig,
    recipe: Recipe,
    tokens: torch.Tensor,
    workspace: Workspace,
    progress: Progress,
    keep_outputs: Callable[[torch.Tensor], None] | None = None,
) -> list[dict[str, Any]]:
    """Quantize every layer for the inputs that the quantized ones before it give.

    Where layers are trained or corrected, a second stream of hidden states goes through the 16-bit layers: the targets.
    Each of several processes runs its own samples through the layers; the first one rounds.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        recipe: settings of the run.
        tokens: int64 [samples, seqlen].
        workspace: keeps every layer under BLOCKS.
        progress: shows a bar.
        keep_outputs: gets the targets behind the last layer, this process's [samples, seqlen, hidden], to use up.

    Returns:
        a report per layer.

    Raises:
        UserError: if inputs hold NaN or infinity, or a file cannot be written.
    """
    names = [f"{BLOCKS}/{index:05d}" for index in range(source.num_blocks)]
    if all(workspace.has(name) for name in names):
        logger.info("%d blocks from the interrupted run", source.num_blocks)
        return [workspace.report(name) for name in names]
    used, samples = tokens if recipe.block_tokens else tokens[: recipe.samples], parallel.share(recipe.samples)
    inputs = source.embed(used[parallel.rank() :: parallel.size()])
    targets = inputs.clone() if recipe.block_tokens or recipe.correction else None
    reports, started, computed = [], time.monotonic(), 0
    task = progress.add_task("calibrating blocks", total=source.num_blocks)
    for index, name in enumerate(names):
        with source.block(index) as block:
            known, original = workspace.has(name), None
            computed += not known
            if recipe.correction and not known:
                original = Original(block.clone(), targets[:samples].clone())
            if targets is not None:
                block.run(targets, out=targets)
            report = workspace.step(
                name,
                lambda block=block, original=original: _quantize(
                    block, original, inputs, targets, source, config, recipe, progress
                ),
            )
            if known:
                block.install(workspace.load(name), config)
            block.run(inputs, out=inputs)
        reports.append(report)
        seconds = None if known else (time.monotonic() - started) / computed
        _log(index, source.num_blocks, report, seconds)
        progress.advance(task)
    progress.remove_task(task)
    if targets is not None and keep_outputs is not None:
        keep_outputs(targets)
    return reports


def _quantize(
    block: Block,
    original: Original | None,
    inputs: torch.Tensor,
    targets: torch.Tensor | None,
    source: SourceModel,
    config: QuantConfig,
    recipe: Recipe,
    progress: Progress,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and report of one layer; leaves it quantized."""
    samples = parallel.share(recipe.samples)
    tensors, reports = quantize_block(block, inputs[:samples], config, recipe, original, progress)
    training = None
    if recipe.block_tokens:
        tensors, training = reconstruct(source, config, recipe, block, tensors, inputs, targets, progress)
    return tensors, {"inputs": reports, "reconstruction": training}


def _log(index: int, count: int, report: dict[str, Any], seconds: float | None) -> None:
    """One line per layer; `seconds` per layer so far, None for a layer of the interrupted run."""
    errors = [entry["refined_output_error"] for entry in report["inputs"]]
    line = f"block {index + 1} of {count}: output error {sum(errors) / len(errors):.4f}, "
    if seconds is None:
        logger.info(line + "from the interrupted run")
    else:
        logger.info(line + f"{seconds:.1f} s per block, {seconds * (count - index - 1) / 60:.0f} min to go")
