"""Perplexity of checkpoints whose linear layers see int8 activations, simulated in float32.

    python benchmarks/activations.py CHECKPOINT ... --perplexity wikitext2 [--context 2048] [--windows 4] [--json FILE]

Inputs of the packed layers are rounded to int8, symmetrically, behind the rotation or in front of it; one scale per
token, or one per token and group of the weights. Products are exact up to float32, as those of int8 with int32 sums.

The JSON file is written after every measurement; the same command, started again, goes on there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from bq_calibration.evaluation import Evaluator
from bq_kernels.format import PER_CHANNEL
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.activation_rounding.layers import PLACES, RoundingLinear, replace_layers
from benchmarks.harness.provenance import command, cpu, versions
from benchmarks.harness.results import finish, write_json

app = typer.Typer(add_completion=False)


def settings_of(kind: str, group_size: int) -> list[tuple[str, int | None]]:
    """Places and columns per scale to measure; without a rotation the two places are one."""
    places = PLACES[2:] if kind == "none" else PLACES[1:]
    columns = (None,) if group_size == PER_CHANNEL else (None, group_size)
    return [("", None), *((place, size) for size in columns for place in reversed(places))]


def measure_rows(
    folder: Path, rows: list[dict[str, Any]], dataset: str, context: int, windows: int | None, progress: Progress
) -> Iterator[None]:
    """Measure a checkpoint under every setting that is not in `rows`, and add it there; yields after each.

    A row has `place`, `columns` (None: one scale per token), `perplexity` and its ratio to the first row's.
    """
    evaluator = Evaluator(str(folder), "float32", "cpu", packed=True)
    quant = evaluator.model.config.quantization_config.parsed
    layers: list[RoundingLinear] = replace_layers(evaluator.model)
    for place, columns in settings_of(quant.rotation.kind, quant.group_size)[len(rows) :]:
        for layer in layers:
            layer.place, layer.columns = place, columns
        value = evaluator.perplexity(dataset, context, windows, progress)["value"]
        ratio = value / (rows[0]["perplexity"] if rows else value)
        rows.append({"place": place, "columns": columns, "perplexity": value, "ratio": ratio})
        yield


def facts_of(folder: Path) -> dict[str, Any]:
    """Rotation, recipe and bits per weight of a checkpoint, from its config and report."""
    quant = json.loads((folder / "config.json").read_text())["quantization_config"]
    report = folder / "bq_report.json"
    totals = json.loads(report.read_text())["totals"] if report.exists() else {}
    return {"rotation": quant["rotation"], "group_size": quant["group_size"]} | {
        name: totals[name] for name in ("bits_per_weight",) if name in totals
    }


def table_of(checkpoints: list[dict[str, Any]]) -> Table:
    """One line per checkpoint and setting."""
    table = Table(title="perplexity with int8 activations")
    for name in ("checkpoint", "rotation", "bits per weight", "int8", "one scale per", "perplexity", "×"):
        table.add_column(name)
    for found in checkpoints:
        for row in found["rows"]:
            scale = "token" if row["columns"] is None else f"token and {row['columns']} columns"
            table.add_row(
                found["checkpoint"],
                found["rotation"]["kind"],
                f"{found['bits_per_weight']:.3f}" if "bits_per_weight" in found else "",
                row["place"] or "no",
                scale if row["place"] else "",
                f"{row['perplexity']:.2f}",
                f"{row['ratio']:.4f}",
            )
    return table


@app.command(help=__doc__)
def main(
    checkpoints: Annotated[list[Path], typer.Argument(help="Packed checkpoints.")],
    perplexity: Annotated[str, typer.Option(help="Text, as for bq-eval.")] = "wikitext2",
    context: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Only the first so many windows.")] = None,
    as_json: Annotated[Path, typer.Option("--json", help="Results; the table lies beside as .md.")] = Path(
        "benchmarks/results/activations.json"
    ),
) -> None:
    """Measure every checkpoint, print the table, write the results."""
    record: dict[str, Any] = {
        "command": command(),
        "versions": versions("torch", "transformers"),
        "device": f"CPU: {cpu()}, {os.cpu_count()} threads",
        "settings": {"perplexity": Path(perplexity).name, "context": context, "windows": windows},
    }
    before = json.loads(as_json.read_text()) if as_json.exists() else {}
    same = all(before.get(name) == record[name] for name in ("versions", "device", "settings"))
    measured = {found["checkpoint"]: found["rows"] for found in before["checkpoints"]} if same else {}
    found = record["checkpoints"] = [
        {"checkpoint": folder.name} | facts_of(folder) | {"rows": measured.get(folder.name, [])}
        for folder in checkpoints
    ]
    with Progress() as progress:
        for folder, checkpoint in zip(checkpoints, found, strict=True):
            for _ in measure_rows(folder, checkpoint["rows"], perplexity, context, windows, progress):
                write_json(as_json, record)
    table = table_of(found)
    finish(Console(width=140), record, as_json, [table], markdown=table)
