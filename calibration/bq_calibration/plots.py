"""Pictures of a run's report, one function per figure; None where there is nothing to show."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean as mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from .errors import explain_write

LAST_STEPS = 16  # of the training of a block that the picture shows


def write_plots(folder: Path, report: dict[str, Any]) -> None:
    """Draw every figure of a report as a PNG file into a new folder.

    Raises:
        WriteError: if one cannot be written.
    """
    with explain_write(folder):
        folder.mkdir(exist_ok=True)
        for name, draw in FIGURES.items():
            figure = draw(report)
            if figure is not None:
                figure.savefig(folder / f"{name}.png", dpi=100)
                plt.close(figure)


def _by_layers(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Reports of the input groups in the order of the blocks, by the names of their layers."""
    names = dict.fromkeys(entry["layers"] for entry in report["inputs"])
    return {name: [entry for entry in report["inputs"] if entry["layers"] == name] for name in names}


def outliers(report: dict[str, Any]) -> Figure:
    """Kurtosis, maximum over RMS and skew of the inputs, before and after rotation."""
    figure, axes = plt.subplots(3, 2, figsize=(11, 10), sharex=True, layout="tight")
    measures = (("kurtosis", "kurtosis (Gaussian: 3)"), ("max_over_rms", "max / RMS"), ("skew", "skew"))
    for row, (key, label) in enumerate(measures):
        for axis, when in zip(axes[row], ("before", "after"), strict=True):
            for name, entries in _by_layers(report).items():
                if when in entries[0]["inputs"]:
                    axis.plot([entry["inputs"][when][key] for entry in entries], marker=".", label=name)
            axis.set(ylabel=label, yscale="symlog" if key == "skew" else "log")
            axis.set_title(f"{when} rotation" if row == 0 else "")
    axes[0][0].legend(fontsize="small")
    for axis in axes[-1]:
        axis.set_xlabel("decoder block")
    figure.suptitle("Outliers of the inputs of linear layers")
    return figure


def output_error(report: dict[str, Any]) -> Figure:
    """Relative output error of every group of layers by kind of rotation."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), sharex=True, layout="tight")
    config = report["quantization_config"]
    for axis, (name, entries) in zip(axes.flat, _by_layers(report).items(), strict=False):
        for kind in entries[0]["relative_output_error"]:
            axis.plot([entry["relative_output_error"][kind] for entry in entries], marker=".", label=kind)
        refined = [entry["refined_output_error"] for entry in entries]
        axis.plot(refined, "k:", label=f"{config['rotation']['kind']}, refined")
        axis.set(yscale="log", title=name)
        axis.legend(fontsize="small")
    figure.supxlabel("decoder block")
    figure.supylabel("relative output error")
    figure.suptitle(f"Error at {config['bits']} bits by rotation")
    return figure


def coherence(report: dict[str, Any]) -> Figure | None:
    """Coherence of every rotation beside the least possible."""
    if "coherence" not in report["inputs"][0]:
        return None
    figure, axis = plt.subplots(figsize=(8, 4), layout="tight")
    for name, entries in _by_layers(report).items():
        line = axis.plot([entry["coherence"] for entry in entries], marker=".", label=name)[0]
        axis.axhline(entries[0]["best_coherence"], color=line.get_color(), linestyle=":", linewidth=1)
    axis.set(xlabel="decoder block", ylabel="coherence μ = max |Q_ij|", title="Coherence; dotted: 1/√b")
    axis.legend(fontsize="small")
    return figure


def learning(report: dict[str, Any]) -> Figure | None:
    """Learning curves of the angles."""
    if not report["inputs"][0]["learning_curve"]:
        return None
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="tight")
    for axis, (name, entries) in zip(axes.flat, _by_layers(report).items(), strict=False):
        for entry in entries:
            curve, depth = entry["learning_curve"], entry["block"] / max(1, len(entries) - 1)
            axis.plot([loss / curve[0] for loss in curve], color=plt.cm.viridis(depth), linewidth=0.8)
        axis.set_title(name)
    figure.supxlabel("step")
    figure.supylabel("loss / loss at the start")
    figure.suptitle("Learning the angles; from dark (first block) to light (last)")
    return figure


def training(report: dict[str, Any]) -> Figure | None:
    """Loss of end-to-end training at every step."""
    trained = [stage for stage in report["stages"] if "losses" in stage]
    if not trained:
        return None
    figure, axis = plt.subplots(figsize=(8, 4), layout="tight")
    start = 0
    for stage in trained:
        steps = range(start, start + len(stage["losses"]))
        axis.plot(steps, stage["losses"], label=stage["stage"])
        start += len(steps)
    axis.set(xlabel="step", ylabel="KL to the 16-bit model, nats per token", title="End-to-end training")
    axis.legend()
    return figure


def reconstruction(report: dict[str, Any]) -> Figure | None:
    """Loss of every block before and after its training."""
    blocks = report["reconstruction"]
    if not any(blocks):
        return None
    figure, axis = plt.subplots(figsize=(8, 4), layout="tight")
    if "held_out_loss" in blocks[0]:
        for i, when in enumerate(("before", "after")):
            axis.plot([block["held_out_loss"][i] for block in blocks], label=f"held-out text, {when}")
    axis.plot([mean(block["losses"][-LAST_STEPS:]) for block in blocks], "k:", label="last steps")
    axis.set(xlabel="decoder block", ylabel="squared error + 1 − cosine", title="Training of the blocks")
    axis.legend()
    return figure


FIGURES = {
    figure.__name__: figure for figure in (outliers, output_error, coherence, learning, training, reconstruction)
}
