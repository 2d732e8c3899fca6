"""What `bq-inspect` says of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .checkpoint import verify


def describe(folder: Path) -> dict[str, Any]:
    """Verify a checkpoint and gather what there is to say of it, the run's report included where it has one.

    Raises:
        UserError: naming the first tensor that breaks the format.
    """
    verified = verify(folder)
    report = folder / "bq_report.json"
    return {
        "checkpoint": str(folder),
        "quantization_config": verified.config.to_dict(),
        "bits_per_weight": verified.bits_per_weight(),
        "stored_bits": verified.stored_bits,
        "total_bytes": verified.total_bytes,
        "layers": {name: {"out_features": n, "in_features": k} for name, (n, k) in verified.layers.items()},
        "report": json.loads(report.read_text()) if report.exists() else None,
    }


def print_description(description: dict[str, Any], console: Console) -> None:
    """Print `describe`'s result as tables."""
    config = description["quantization_config"]
    summary = Table("checkpoint", description["checkpoint"], title="All tensors verified")
    summary.add_row("bits, group, zero point", f"{config['bits']}, {config['group_size']}, {config['zero_point']}")
    summary.add_row("rotation", f"{config['rotation']['kind']} {config['rotation'].get('block_size', '')}")
    summary.add_row("packed layers", str(len(description["layers"])))
    summary.add_row("bits per weight, all counted", f"{description['bits_per_weight']:.4f}")
    weights = sum(layer["out_features"] * layer["in_features"] for layer in description["layers"].values())
    for part, bits in description["stored_bits"].items():
        summary.add_row(f"  {part}", f"{bits / weights:.4f}")
    summary.add_row("size of all tensors", f"{description['total_bytes'] / 1e6:.1f} MB")
    report = description["report"]
    if report:
        run = report["run"]
        summary.add_row("16-bit model", f"{report['totals']['source_bytes'] / 1e6:.1f} MB")
        summary.add_row("calibrated on", f"{report['recipe']['dataset']}, {report['calibration_tokens']:,} tokens")
        summary.add_row("calibration", f"{run['wall_seconds']:.0f} s, peak {run['peak_memory_bytes'] / 1e9:.2f} GB")
    console.print(summary)
    if not report:
        return
    table = Table("stage", "measure", "before", "after", title="What every stage has gained")
    for gain in report["gains"]:
        table.add_row(gain["stage"], gain["measure"], f"{gain['before']:.4f}", f"{gain['after']:.4f}")
    console.print(table)
    kinds = list(report["inputs"][0]["relative_output_error"])
    table = Table(
        "block",
        "layers",
        "kurtosis",
        "→",
        "max/RMS",
        "→",
        "skew",
        "→",
        "μ·√b",
        *(f"error, {k}" for k in kinds),
        "refined",
    )
    for row in report["inputs"]:
        before, after = row["inputs"]["before"], row["inputs"].get("after", {})
        cells = []
        for key in ("kurtosis", "max_over_rms", "skew"):
            cells += [f"{before[key]:.1f}", f"{after[key]:.1f}" if after else "–"]
        mu = f"{row['coherence'] / row['best_coherence']:.2f}" if "coherence" in row else "–"
        errors = (f"{row['relative_output_error'][kind]:.4f}" for kind in kinds)
        table.add_row(str(row["block"]), row["layers"], *cells, mu, *errors, f"{row['refined_output_error']:.4f}")
    console.print(table)
