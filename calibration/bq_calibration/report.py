"""The report of a run: bq_report.json and pictures."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from statistics import fmean as mean
from typing import Any

import matplotlib
from bq_kernels.format import QuantConfig

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .checkpoint import verify, write_json
from .model import TensorStore
from .recipes import Recipe

LAST_STEPS = 16  # of the training of a block, which the picture shows


def write_report(
    folder: Path,
    source: Path,
    config: QuantConfig,
    recipe: Recipe,
    tokens: int,
    blocks: list[dict[str, Any]],
    stages: list[dict[str, Any]],
    run: dict[str, Any],
) -> None:
    """Write `bq_report.json` and the pictures under `report/` into a finished checkpoint.

    Args:
        folder: the checkpoint; it is verified here.
        source: the 16-bit model, for its size.
        config: quantization config.
        recipe: settings of the run.
        tokens: calibration tokens used.
        blocks: per decoder block, the reports of its input groups and the losses of its reconstruction, or None.
        stages: of end-to-end training, the model as it was rounded first; empty without training.
        run: time, memory and machine: all that differs from run to run stands here.
    """
    verified = verify(folder)
    store = TensorStore(source)
    inputs = [report for block in blocks for report in block["inputs"]]
    reconstruction = [block["reconstruction"] for block in blocks]
    report = {
        "format_version": 1,
        "source_model": source.resolve().name,
        "quantization_config": config.to_dict(),
        "recipe": recipe.to_dict(),
        "calibration_tokens": tokens,
        "totals": {
            "bits_per_weight": verified.bits_per_weight(),
            "stored_bits": verified.stored_bits,
            "quantized_weights": sum(n * k for n, k in verified.layers.values()),
            "checkpoint_bytes": verified.total_bytes,
            "source_bytes": sum(store.nbytes(name) for name in store.names()),
        },
        "inputs": inputs,
        "reconstruction": reconstruction,
        "stages": stages,
        "gains": gains(recipe, inputs, reconstruction, stages),
        "run": run,
    }
    write_json(folder / "bq_report.json", report)
    draw(folder / "report", inputs, config, reconstruction, stages)


def gains(
    recipe: Recipe,
    inputs: list[dict[str, Any]],
    reconstruction: list[dict[str, Any] | None],
    stages: list[dict[str, Any]],
) -> list[dict[str, Any]]:
    """What every stage of the recipe has gained: its name, what is measured, and that before and after it.

    Layers and blocks are means over all of them: errors relative to the output, and losses on held-out text.
    """
    kinds = ("none", "hadamard", "butterfly")
    kinds = kinds[: 1 + kinds.index(recipe.rotation)]
    errors = [mean(report["relative_output_error"][kind] for report in inputs) for kind in kinds]
    measure = "output error of a layer"
    found = [(f"rotation, {kind}", measure, *pair) for kind, pair in zip(kinds[1:], pairwise(errors), strict=True)]
    if recipe.refine:
        found.append(("refine", measure, errors[-1], mean(report["refined_output_error"] for report in inputs)))
    if recipe.reconstruct and recipe.held_out:
        pair = [mean(block["held_out_loss"][i] for block in reconstruction) for i in (0, 1)]
        found.append(("reconstruct", "loss of a block on held-out text", *pair))
    for before, after in pairwise(stage for stage in stages if "held_out_divergence" in stage):
        values = (stage["held_out_divergence"] for stage in (before, after))
        found.append((after["stage"], "KL on held-out text, nats a token", *values))
    return [dict(zip(("stage", "measure", "before", "after"), line, strict=True)) for line in found]


def draw(
    folder: Path,
    inputs: list[dict[str, Any]],
    config: QuantConfig,
    reconstruction: list[dict[str, Any] | None],
    stages: list[dict[str, Any]],
) -> None:
    """Draw outliers, output errors, coherence and learning curves as PNG files into a new folder."""
    folder.mkdir()
    names = list(dict.fromkeys(report["layers"] for report in inputs))
    series = {name: [report for report in inputs if report["layers"] == name] for name in names}

    figure, axes = plt.subplots(3, 2, figsize=(11, 10), sharex=True)
    for row, (key, label) in enumerate(
        (("kurtosis", "kurtosis (Gaussian: 3)"), ("max_over_rms", "max / RMS"), ("skew", "skew"))
    ):
        for column, when in enumerate(("before", "after")):
            axis = axes[row][column]
            for name, reports in series.items():
                if when in reports[0]["inputs"]:
                    axis.plot([r["inputs"][when][key] for r in reports], marker=".", label=name)
            axis.set_ylabel(label)
            axis.set_yscale("symlog" if key == "skew" else "log")
            axis.set_title(f"{when} rotation" if row == 0 else "")
    axes[0][0].legend(fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("decoder block")
    figure.suptitle("Outliers of the inputs of linear layers")
    figure.tight_layout()
    figure.savefig(folder / "outliers.png", dpi=100)
    plt.close(figure)

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True)
    for axis, (name, reports) in zip(axes.flat, series.items(), strict=False):
        for kind in reports[0]["relative_output_error"]:
            axis.plot([r["relative_output_error"][kind] for r in reports], marker=".", label=kind)
        axis.plot([r["refined_output_error"] for r in reports], "k:", label=f"{config.rotation.kind}, refined")
        axis.set_yscale("log")
        axis.set_title(name)
        axis.legend(fontsize="small")
    figure.supxlabel("decoder block")
    figure.supylabel("relative output error")
    figure.suptitle(f"Error at {config.bits} bits by rotation")
    figure.tight_layout()
    figure.savefig(folder / "output_error.png", dpi=100)
    plt.close(figure)

    if config.rotation.kind != "none":
        figure, axis = plt.subplots(figsize=(8, 4))
        for name, reports in series.items():
            line = axis.plot([r["coherence"] for r in reports], marker=".", label=name)[0]
            axis.axhline(reports[0]["best_coherence"], color=line.get_color(), linestyle=":", linewidth=1)
        axis.set(xlabel="decoder block", ylabel="coherence μ = max |Q_ij|", title="Coherence; dotted: 1/√b")
        axis.legend(fontsize="small")
        figure.tight_layout()
        figure.savefig(folder / "coherence.png", dpi=100)
        plt.close(figure)

    if inputs[0]["learning_curve"]:
        figure, axes = plt.subplots(2, 2, figsize=(11, 7))
        for axis, (name, reports) in zip(axes.flat, series.items(), strict=False):
            for report in reports:
                curve = report["learning_curve"]
                depth = report["block"] / max(1, len(reports) - 1)
                axis.plot([loss / curve[0] for loss in curve], color=plt.cm.viridis(depth), linewidth=0.8)
            axis.set_title(name)
        figure.supxlabel("step")
        figure.supylabel("loss / loss at the start")
        figure.suptitle("Learning the angles; from dark (first block) to light (last)")
        figure.tight_layout()
        figure.savefig(folder / "learning.png", dpi=100)
        plt.close(figure)

    trained = [stage for stage in stages if "losses" in stage]
    if trained:
        figure, axis = plt.subplots(figsize=(8, 4))
        start = 0
        for stage in trained:
            steps = range(start, start + len(stage["losses"]))
            axis.plot(steps, stage["losses"], label=stage["stage"])
            start += len(steps)
        axis.set(xlabel="step", ylabel="KL to the 16-bit model, nats a token", title="End-to-end training")
        axis.legend()
        figure.tight_layout()
        figure.savefig(folder / "training.png", dpi=100)
        plt.close(figure)

    if any(reconstruction):
        figure, axis = plt.subplots(figsize=(8, 4))
        if "held_out_loss" in reconstruction[0]:
            for i, when in enumerate(("before", "after")):
                axis.plot([block["held_out_loss"][i] for block in reconstruction], label=f"held-out text, {when}")
        axis.plot([mean(block["losses"][-LAST_STEPS:]) for block in reconstruction], "k:", label="last steps")
        axis.set(xlabel="block", ylabel="squared error + 1 − cosine", title="Training of the blocks")
        axis.legend()
        figure.tight_layout()
        figure.savefig(folder / "reconstruction.png", dpi=100)
        plt.close(figure)
