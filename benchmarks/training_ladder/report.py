"""Table and plot of a ladder."""

from __future__ import annotations

from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from rich.table import Table


def table_of(record: dict[str, Any]) -> Table:
    """A line per rung: tokens, bits, held-out divergence, perplexities with their ratio to the 16-bit model's."""
    source = record["source"]
    table = Table("tokens", "bits per weight", "held-out KL", *source, "s")
    table.add_row("16-bit model", "16", "", *(f"{value:.2f}" for value in source.values()), "")
    for row in record["rungs"]:
        ratios = [f"{row['perplexity'][name]:.2f} ({row['perplexity'][name] / source[name]:.3f}×)" for name in source]
        divergence = row["held_out_divergence"]
        shown = "" if divergence is None else f"{divergence:.4f}"
        table.add_row(f"{row['tokens']:,}", f"{row['bits_per_weight']:.3f}", shown, *ratios, f"{row['seconds']:.0f}")
    return table


def plot(record: dict[str, Any]) -> Figure:
    """Perplexity relative to the 16-bit model's by tokens."""
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    tokens = [row["tokens"] for row in record["rungs"]]
    for name, value in record["source"].items():
        axes.plot(tokens, [row["perplexity"][name] / value for row in record["rungs"]], marker="o", label=name)
    axes.set(xscale="log", xlabel="tokens of training", ylabel="perplexity, 16 bits = 1")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
