"""The gate in front of the first block: the source read and hashed, its activations in range, room for the results."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bq_kernels.format import QuantConfig
from rich.progress import Progress

from .compute import dtype_name
from .errors import UserError
from .model import SourceModel
from .recipes import Recipe

_CHUNK = 2**24  # bytes that are hashed at a time


def fingerprint(files: list[Path], progress: Progress, title: str) -> str:
    """SHA-256 over names and contents of files, in their order."""
    total = hashlib.sha256()
    task = progress.add_task(title, total=sum(file.stat().st_size for file in files))
    for file in files:
        total.update(file.name.encode() + b"\0")
        with open(file, "rb") as handle:
            while chunk := handle.read(_CHUNK):
                total.update(chunk)
                progress.advance(task, len(chunk))
    progress.remove_task(task)
    return total.hexdigest()


def source_fingerprint(source: SourceModel, progress: Progress) -> str:
    """SHA-256 of everything in the source that a checkpoint is made of: weights, config, tokenizer."""
    beside = [f for f in sorted(source.folder.glob("*.json")) if f.name != "bq_report.json"]
    return fingerprint([*source.store.files, *beside], progress, "fingerprint of the model")


def data_fingerprint(datasets: str, progress: Progress) -> str | None:
    """SHA-256 of the local files among data sets; None where there are none."""
    files = [Path(part) for part in datasets.split(",") if Path(part).is_file()]
    return fingerprint(files, progress, "fingerprint of the data") if files else None


def check_weights(source: SourceModel, progress: Progress) -> None:
    """Refuse NaN and infinity in any tensor of the source, before hours of work on the others.

    Raises:
        UserError: naming the tensor.
    """
    task = progress.add_task("checking the weights", total=len(source.store.names()))
    for name in source.store.names():
        source.read(name)
        progress.advance(task)
    progress.remove_task(task)


def check_activations(source: SourceModel, tokens: torch.Tensor, progress: Progress) -> None:
    """Refuse a model whose activations overflow float16, where the run computes in it.

    Args:
        source: the 16-bit model.
        tokens: int64 [samples, seqlen]; the first is run through all layers.

    Raises:
        UserError: naming the layer.
    """
    if source.dtype != torch.float16:
        return  # the range of float32 and bfloat16 suffices
    hidden = source.embed(tokens[:1])
    task = progress.add_task("checking the activations", total=source.num_blocks)
    for index in range(source.num_blocks):
        with source.block(index) as block:
            block.run(hidden, out=hidden)
        if not bool(torch.isfinite(hidden).all()):
            raise UserError(
                f"the activations behind block {index} overflow {dtype_name(source.dtype)}; "
                "use --compute-dtype bfloat16 or float32, also to serve (vllm serve --dtype bfloat16)"
            )
        progress.advance(task)
    progress.remove_task(task)


@dataclass(frozen=True)
class Plan:
    """The cost of a run, before it begins.

    Attributes:
        checkpoint_bytes: of all tensors of the checkpoint.
        disk_bytes: free space that the run needs, unfinished work included.
        memory_bytes: main memory, or memory of the GPU, at most; an estimate.
        operations: floating-point operations; an estimate.
    """

    checkpoint_bytes: int
    disk_bytes: int
    memory_bytes: int
    operations: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def plan(source: SourceModel, config: QuantConfig, recipe: Recipe) -> Plan:
    """Estimate the cost of a run from the model's shapes and the recipe."""
    block, hidden_size = source.empty_block(0), source.config.hidden_size
    packed = weights = cubes = squares = 0
    for group in block.groups:
        for name, layer in block.linears(group).items():
            specs = config.tensors(block.prefix + name, layer.in_features, layer.out_features).values()
            packed += sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs)
            weights += layer.in_features * layer.out_features
            squares += layer.in_features**2 * layer.out_features
        cubes += block.in_features(group) ** 3
    linears = {f"{source.block_prefix(i)}{name}.weight" for i in range(source.num_blocks) for name in block.linears()}
    rest = sum(source.store.nbytes(name) for name in source.store.names() if name not in linears)
    packed, all_weights = packed * source.num_blocks, weights * source.num_blocks
    checkpoint = packed + rest
    item = source.dtype.itemsize
    states = recipe.windows * recipe.seqlen * hidden_size * item
    end_to_end = packed * (bool(recipe.finetune) + bool(recipe.distill)) + states if recipe.trains_end_to_end else 0
    saved = 12 * all_weights if recipe.finetune else 12 * all_weights // config.group(hidden_size)
    disk = checkpoint + packed + end_to_end + saved * recipe.trains_end_to_end + recipe.windows * recipe.seqlen * 8
    layer_bytes = 18 * weights if recipe.reconstruct else (item + 8) * weights
    whole = (18 if recipe.finetune else 0.6) * all_weights + rest * 2 if recipe.trains_end_to_end else 0
    rounding = 3 * (4 * squares + 20 * cubes + 2 * squares * recipe.refine) * source.num_blocks
    forward = 2 * all_weights * recipe.seqlen * (5 * recipe.samples + 2 * recipe.windows * recipe.trains)
    training = 8 * all_weights * 512 * recipe.reconstruct + 8 * all_weights * 2048 * (recipe.finetune + recipe.distill)
    learning = recipe.steps * 6 * 256 * cubes ** (2 / 3) * source.num_blocks * (recipe.rotation == "butterfly")
    memory = int(max(layer_bytes + states * (1 + bool(recipe.reconstruct)), whole) + 5e8)
    return Plan(checkpoint, disk, memory, float(rounding + forward + training + learning))
