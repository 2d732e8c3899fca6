"""Perplexity of a model at 2 bits by method, on the same calibration tokens.

    python benchmarks/accuracy.py MODEL [--dataset c4] [--perplexity wikitext2] [--out build/accuracy] [--json FILE]

Every row is one `bq-calibrate` and one `bq-eval`; what OUT already holds is used again, so an interrupted run goes on
where it stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

BIN = Path(sys.executable).parent
SAMPLES = ["--samples", "64", "--seqlen", "512"]
# the paper's settings but for the calibration tokens, which are the table's
ROWS = {
    "GPTQ, no rotation": ["--rotation", "none", "--rounding", "gptq", "--refine", "0"],
    "Hadamard + GPTQ, blocks of 64": ["--rotation", "hadamard", "--rounding", "gptq", "--refine", "0"],
    "butterfly `fast`": ["--recipe", "fast"],
    "butterfly `paper`": ["--recipe", "paper"],
}


def _run(*command: object) -> None:
    if subprocess.run([str(part) for part in command], check=False).returncode:
        sys.exit(1)


def main(
    model: Annotated[Path, typer.Argument(help="The 16-bit model.")],
    dataset: Annotated[str, typer.Option(help="Calibration data, as for bq-calibrate.")] = "c4",
    perplexity: Annotated[str, typer.Option(help="Evaluation data, as for bq-eval.")] = "wikitext2",
    context: int = 2048,
    windows: Annotated[int | None, typer.Option(help="Only the first windows; all by default.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and scores.")] = Path("build/accuracy"),
    as_json: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/accuracy.json"),
) -> None:
    """Calibrate, evaluate and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    limit = ["--windows", windows] if windows else []
    rows = []
    for label, flags in {"16-bit": None, **ROWS}.items():
        name = "".join(c if c.isalnum() else "-" for c in label)
        checkpoint, scores = (model if flags is None else out / name), out / f"{name}.json"
        if flags is not None and not checkpoint.exists():
            _run(BIN / "bq-calibrate", model, "-o", checkpoint, "--dataset", dataset, *SAMPLES, *flags, "--resume")
        if not scores.exists():
            _run(
                BIN / "bq-eval", checkpoint, "--perplexity", perplexity, "--context", context, *limit, "--json", scores
            )
        measured = json.loads(scores.read_text())["perplexity"]
        row = {"method": label, "flags": flags, "perplexity": measured | {"dataset": Path(measured["dataset"]).name}}
        if flags is not None:
            report = json.loads((checkpoint / "bq_report.json").read_text())
            row["bits_per_weight"] = report["totals"]["bits_per_weight"]
            row["calibration_tokens"] = report["calibration_tokens"]
            row["run"] = report["run"]
        rows.append(row)
    full = rows[0]["perplexity"]["value"]
    table = Table("method", "bits per weight", "perplexity", "× 16-bit", "calibration, s", "peak memory, GB")
    for row in rows:
        value, cells = row["perplexity"]["value"], ("16", "", "")
        if run := row.get("run"):
            cells = (
                f"{row['bits_per_weight']:.3f}",
                f"{run['wall_seconds']:.0f}",
                f"{run['peak_memory_bytes'] / 1e9:.2f}",
            )
        bits, seconds, memory = cells
        table.add_row(row["method"], bits, f"{value:.2f}", f"{value / full:.2f}", seconds, memory)
    Console(width=120).print(table)
    versions = {name: version(name) for name in ("torch", "transformers")}
    command = " ".join(["python", *(Path(argument).name for argument in sys.argv)])  # names, no folders of this machine
    result = {"command": command, "model": model.name, "versions": versions, "rows": rows}
    as_json.parent.mkdir(parents=True, exist_ok=True)
    as_json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
