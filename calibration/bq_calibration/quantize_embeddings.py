"""The embedding and the LM head in few bits, once everything between them is rounded.

Rows are tokens and are rounded one by one, each with scales of its own: how often a token occurs changes nothing there.
But an error in the row of a frequent token is met often, in its look-up and in every prediction of it. So the rows of
the most frequent ones are also kept in 16 bits.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from bq_kernels.format import KEPT, QuantConfig
from bq_kernels.reference import angles_of, dense_weight
from rich.progress import Progress

from . import parallel
from .block import TOKENS_PER_BATCH
from .input_statistics import InputStatistics
from .model import SourceModel
from .quantize import refine
from .quantize_block import find_angles, rotated, round_weight
from .recipes import Recipe
from .sampling import derive_seed
from .store import TensorStore
from .workspace import Workspace

logger = logging.getLogger(__name__)
EMBEDDINGS = "embeddings"  # folder of the workspace
ROWS = 8192  # tokens that are rounded at a time


def quantize_embeddings(
    source: SourceModel,
    config: QuantConfig,
    recipe: Recipe,
    tokens: torch.Tensor,
    blocks: Path,
    workspace: Workspace,
    progress: Progress,
) -> tuple[TensorStore, list[dict[str, Any]]]:
    """Round the embedding and the LM head where `config` packs them.

    The LM head is rounded for the states that the rounded layers give it, those of a rounded embedding if there is
    one. The error of a look-up counts alike in all features: the Hessian of an embedding is the identity. Where both
    are one weight, it is rounded as LM head: a share of the identity in its Hessian has cost more than it gained.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        recipe: settings of the run.
        tokens: int64 [samples, seqlen].
        blocks: folder with the tensors of the quantized layers, and of norms that their training has changed.
        workspace: keeps the result under EMBEDDINGS.
        progress: shows a bar.

    Returns:
        all packed tensors, those of `blocks` among them; and a report per rounded weight.

    Raises:
        UserError: if a file cannot be written.
    """
    names = [name for name in source.embedding_names if config.packs(name)]
    packed, tied, reports = TensorStore(blocks), len(source.embedding_names) == 1, []
    for place, name in enumerate(names):
        is_embedding = name == source.embedding_names[0]

        def compute(name=name, place=place, is_embedding=is_embedding):
            weight = source.read(f"{name}.weight").to(source.device).float()
            hessian, sample = torch.eye(weight.shape[1], device=source.device), weight
            if tied or not is_embedding:
                known = workspace.load(f"{EMBEDDINGS}/{names[0]}") if len(names) == 2 else None
                embedding = {} if known is None else _dense(source, names[0], known, config)
                own = tokens[: recipe.samples][parallel.rank() :: parallel.size()]
                statistics = head_inputs(source, config, packed, embedding, own, progress)
                hessian, sample = statistics.hessian, statistics.sample
            seed = derive_seed(recipe.seed, source.num_blocks, place)
            kept = _frequent(tokens[: recipe.read_windows], len(weight), config.kept_tokens.get(name, 0))
            arguments = name, weight, hessian, sample, kept, config, recipe, seed, progress
            return parallel.from_first(functools.partial(_round, *arguments))

        report = workspace.step(f"{EMBEDDINGS}/{name}", compute)
        logger.info("%s: %d bits, error %.4f", name, report["bits"], report["relative_error"])
        reports.append(report)
    folder = workspace.path / EMBEDDINGS
    return TensorStore(blocks, [*packed.files, *(folder / f"{name}.safetensors" for name in names)]), reports


def _frequent(tokens: torch.Tensor, vocabulary: int, count: int) -> torch.Tensor:
    """The `count` most frequent tokens of a text, int64 in ascending order; of equally frequent ones the first."""
    often = torch.bincount(tokens.flatten(), minlength=vocabulary)
    return often.argsort(descending=True, stable=True)[:count].sort().values


def _dense(
    source: SourceModel, name: str, stored: dict[str, torch.Tensor], config: QuantConfig
) -> dict[str, torch.Tensor]:
    """The weight that stored tensors stand for, by its name."""
    features = source.store.shape(f"{name}.weight")[1]
    block_size, kind = config.rotation.block(name), config.rotation.kind
    angles = angles_of(kind, stored.get(f"{name}.angles"), features, block_size)
    packed = stored[f"{name}.qweight"], stored[f"{name}.scales"], stored.get(f"{name}.zeros")
    kept = (stored.get(f"{name}.{suffix}") for suffix in KEPT)
    return {f"{name}.weight": dense_weight(*packed, angles, block_size, features, *kept)}


@torch.no_grad()
def head_inputs(
    source: SourceModel,
    config: QuantConfig,
    packed: TensorStore,
    embedding: dict[str, torch.Tensor],
    tokens: torch.Tensor,
    progress: Progress,
) -> InputStatistics:
    """Statistics of the states in front of the LM head of the rounded model, in all processes.

    Args:
        source: the 16-bit model.
        config: the checkpoint's format.
        packed: tensors of the quantized layers, and of norms that their training has changed.
        embedding: its rounded weight, by name; empty for that of the 16-bit model.
        tokens: this process's, int64 [samples, seqlen].
        progress: shows a bar.
    """
    task = progress.add_task("states in front of the LM head", total=source.num_blocks)
    statistics = InputStatistics(source.text_config.hidden_size, source.device)
    with source.replaced(embedding):
        hidden = source.embed(tokens)
        for index in range(source.num_blocks):
            with source.block(index) as block:
                names = (name for name in packed.names() if name.startswith(block.prefix))
                block.install({name: packed.get(name) for name in names}, config)
                block.run(hidden, out=hidden)
            progress.advance(task)
        with source.final_norm() as norm:
            for part in hidden.split(max(1, TOKENS_PER_BATCH // hidden.shape[1])):
                statistics.add(norm(part))
    progress.remove_task(task)
    statistics.add_up()
    return statistics


@torch.no_grad()
def _round(
    name: str,
    weight: torch.Tensor,
    hessian: torch.Tensor,
    sample: torch.Tensor,
    kept: torch.Tensor,
    config: QuantConfig,
    recipe: Recipe,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors of the checkpoint, by full name and checked against the format, and the report, for weight [N, K].

    Rows `kept` are stored in 16 bits as well.
    """
    bits, block_size = config.bits_of(name), config.rotation.block(name)
    with torch.enable_grad():
        angles, losses = find_angles(weight, hessian, sample, block_size, bits, config, recipe, seed)
    task = progress.add_task(f"rounding {name}", total=len(weight))
    parts, lost, energy = [], 0.0, 0.0
    packed = torch.ones(len(weight), 1, device=weight.device).index_fill_(0, kept.to(weight.device), 0)
    for rows, read in zip(weight.split(ROWS), packed.split(ROWS), strict=True):
        rows, basis = rotated(rows, hessian, angles, block_size)
        quantized = refine(round_weight(rows, basis, bits, config, recipe), rows, basis, recipe.refine)
        error = (quantized.weight() - rows) * read
        lost, energy = lost + float(((error @ basis) * error).sum()), energy + float(((rows @ basis) * rows).sum())
        parts.append(quantized.tensors())
        progress.advance(task, len(rows))
    progress.remove_task(task)
    stored = {suffix: torch.cat([part[suffix] for part in parts]) for suffix in parts[0]}
    if config.rotation.kind == "butterfly":
        stored["angles"] = angles.cpu()
    if len(kept):
        stored |= dict(zip(KEPT, (kept.int(), weight[kept].half().cpu()), strict=True))
    for suffix, spec in config.tensors(name, weight.shape[1], len(weight)).items():
        spec.check(f"{name}.{suffix}", stored[suffix])
    report = {"layer": name, "bits": bits, "rotation_block": block_size, "relative_error": lost / energy}
    report["kept_tokens"] = len(kept)
    return {f"{name}.{suffix}": tensor for suffix, tensor in stored.items()}, report | {"learning_curve": losses}
