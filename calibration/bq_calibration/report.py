"""The report of a run: bq_report.json."""

from __future__ import annotations

import platform
import resource
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import torch
from bq_kernels.format import QuantConfig

from . import parallel
from .checkpoint import REPORT, verify
from .compute import dtype_name
from .data import dataset_name
from .files import write_json
from .model import SourceModel
from .recipes import Recipe
from .workspace import Workspace


def write_report(
    folder: Path,
    source: SourceModel,
    config: QuantConfig,
    recipe: Recipe,
    tokens: int,
    blocks: list[dict[str, Any]],
    stages: list[dict[str, Any]],
    embeddings: list[dict[str, Any]],
    run: dict[str, Any],
) -> dict[str, Any]:
    """Verify a finished checkpoint and write `bq_report.json` into it.

    Args:
        folder: the checkpoint.
        source: the 16-bit model, for its name and size.
        config: quantization config.
        recipe: settings of the run.
        tokens: calibration tokens used.
        blocks: per decoder layer, the reports of its input groups and the losses of its reconstruction, or None.
        stages: of end-to-end training, the model as it was rounded first; empty without training.
        embeddings: of the embedding and the LM head, where they are packed.
        run: time, memory and machine: all that differs from run to run stands here.

    Returns:
        the report.

    Raises:
        UserError: if the checkpoint breaks the format or the report cannot be written.
    """
    verified = verify(folder, {dtype_name(source.kept_dtype(name)) for name in source.store.names()})
    inputs = [report for block in blocks for report in block["inputs"]]
    reconstruction = [block["reconstruction"] for block in blocks]
    named = {"dataset": recipe.dataset, "mix": recipe.mix, "decontaminate": recipe.decontaminate}
    report = {
        "format_version": 1,
        "source_model": source.name,
        "quantization_config": config.to_dict(),
        "recipe": recipe.to_dict() | {name: value and dataset_name(value) for name, value in named.items()},
        "calibration_tokens": tokens,
        "totals": {
            "bits_per_weight": verified.bits_per_weight(),
            "file_bits_per_weight": verified.file_bits_per_weight(),
            "stored_bits": verified.stored_bits,
            "weights": verified.weights,
            "quantized_weights": sum(n * k for n, k in verified.layers.values()),
            "checkpoint_bytes": verified.total_bytes,
            "source_bytes": sum(source.store.nbytes(name) for name in source.store.names()),
        },
        "unquantized_dtypes": verified.unquantized_dtypes,
        "inputs": inputs,
        "reconstruction": reconstruction,
        "stages": stages,
        "embeddings": embeddings,
        "gains": gains(recipe, inputs, reconstruction, stages),
        "run": run,
    }
    write_json(folder / REPORT, report)
    return report


def run_facts(source: SourceModel, workspace: Workspace) -> dict[str, Any]:
    """Facts that differ from run to run: time, of interrupted runs too; memory, of the last first process; machine."""
    on_gpu = source.device.type == "cuda"
    return {
        "wall_seconds": round(workspace.elapsed(), 1),
        "resumed": workspace.resumed,
        "processes": parallel.size(),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
        "device": torch.cuda.get_device_name() if on_gpu else _cpu(),
        "compute_dtype": source.compute.to_dict(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
    }


def _cpu() -> str:
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread" + "s" * (threads > 1)


def gains(
    recipe: Recipe,
    inputs: list[dict[str, Any]],
    reconstruction: list[dict[str, Any] | None],
    stages: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """The gain of every stage of the recipe: its name, the measure, and its value before and after.

    Layers and blocks are means over all of them: errors relative to the output, and losses on held-out text.
    """
    kinds = ("none", "hadamard", "butterfly")
    kinds = [kind for kind in kinds[: 1 + kinds.index(recipe.rotation)] if kind in inputs[0]["relative_output_error"]]
    errors = [mean(report["relative_output_error"][kind] for report in inputs) for kind in kinds]
    measure = "output error of a layer"
    rows = [(f"rotation, {kind}", measure, *pair) for kind, pair in zip(kinds[1:], pairwise(errors), strict=True)]
    if recipe.refine:
        rows.append(("refine", measure, errors[-1], mean(report["refined_output_error"] for report in inputs)))
    if recipe.block_tokens and recipe.held_out:
        pair = [mean(block["held_out_loss"][i] for block in reconstruction) for i in (0, 1)]
        rows.append(("blocks", "loss of a block on held-out text", *pair))
    for before, after in pairwise(stage for stage in stages if "held_out_divergence" in stage):
        values = (stage["held_out_divergence"] for stage in (before, after))
        rows.append((after["stage"], "KL on held-out text, nats per token", *values))
    return [dict(zip(("stage", "measure", "before", "after"), line, strict=True)) for line in rows]
