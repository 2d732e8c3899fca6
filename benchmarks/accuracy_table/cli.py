"""Accuracy of a model at a few bits by method: same model, calibration tokens and group size, all bits counted.

    python benchmarks/accuracy.py MODEL [--bits 2 --bits 3] [--dataset c4] [--perplexity wikitext2 --perplexity c4]
        [--tasks hellaswag,mmlu:20 [--limit 500]] [--seed 0 --seed 1] [--only AWQ] [--peers-python PATH]
        [--out build/accuracy] [--json FILE]

A row is one command that writes a checkpoint and one `bq-eval` per data set and task. Checkpoints and scores in OUT are
used again, so an interrupted run goes on where it stopped. A row whose command fails is left out, with the reason; its
whole output is in OUT/BITS/ROW.log. Packages run under --peers-python, since their requirements may not go together
with ours: pip install auto-round llmcompressor typer.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.accuracy_table.bench import Bench, LeftOut, merged
from benchmarks.accuracy_table.methods import ROWS
from benchmarks.accuracy_table.report import plot, table_of
from benchmarks.harness.provenance import claim_folder, command, versions
from benchmarks.harness.results import finish

app = typer.Typer(add_completion=False)
console = Console(width=160)


def limits(tasks: str, limit: int | None) -> dict[str, int | None]:
    """Number of documents by task, None for all: `hellaswag,mmlu:20` has a limit of its own for mmlu.

    Raises:
        typer.BadParameter: if a limit is no number.
    """
    found = {}
    for task in filter(None, tasks.split(",")):
        name, _, own = task.partition(":")
        if own and not own.isdecimal():
            raise typer.BadParameter(f"--tasks {task}: the limit {own!r} is no number of documents")
        found[name] = int(own) if own else limit
    return found


def measure_rows(
    bench: Bench, bits: list[int], seeds: list[int], only: list[str]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows whose name starts with one of `only`, all if that is empty; and the reason by name for what is left out."""
    rows, left_out = [], {}
    for width in bits:
        for row in ROWS:
            if only and not row.label.startswith(tuple(only)):
                continue
            runs = []
            for seed in seeds:
                name = f"{width} bits, {row.label}, seed {seed}"
                try:
                    runs.append(bench.measure(row, width, seed))
                    console.print(f"{name}: done", highlight=False)
                except LeftOut as reason:
                    left_out[name] = str(reason)
            if runs:
                rows.append(merged(runs))
    return rows, left_out


@app.command(help=__doc__)
def main(
    model: Annotated[Path, typer.Argument(help="The 16-bit model.")],
    bits: Annotated[list[int], typer.Option(help="Bits per code; may be given several times.")] = [2],  # noqa: B006
    group_size: Annotated[int, typer.Option(help="Columns that share a scale.")] = 64,
    dataset: Annotated[str, typer.Option(help="Calibration data, as for bq-calibrate.")] = "c4",
    samples: Annotated[int, typer.Option(help="Calibration sequences for rounding.")] = 128,
    train_samples: Annotated[int, typer.Option(help="Sequences for training, those among them.")] = 640,
    seqlen: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    perplexity: Annotated[
        list[str], typer.Option(help="Evaluation data, as for bq-eval; may be given several times.")
    ] = ["wikitext2"],  # noqa: B006
    context: Annotated[int, typer.Option(help="Tokens per perplexity window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Only the first windows; all by default.")] = None,
    tasks: Annotated[
        str, typer.Option(help="lm-eval tasks, comma-separated; mmlu:20 has a limit of its own, per subject of MMLU.")
    ] = "",
    include_path: Annotated[Path | None, typer.Option(help="Folder of further lm-eval task files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first documents of each task.")] = None,
    seed: Annotated[list[int], typer.Option(help="Of tokens and methods; several give mean and spread.")] = [0],  # noqa: B006
    only: Annotated[list[str], typer.Option(help="Rows whose name starts so; may be given several times.")] = [],  # noqa: B006
    peers_python: Annotated[Path, typer.Option(help="Interpreter that has the packages.")] = Path(sys.executable),
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and scores.")] = Path("build/accuracy"),
    as_json: Annotated[Path, typer.Option("--json", help="Results; .md and .png lie beside.")] = Path(
        "benchmarks/results/accuracy.json"
    ),
) -> None:
    """Calibrate, evaluate, print the table, write the results and draw them."""
    shared = {
        "model": str(model.resolve()),
        "dataset": dataset,
        "samples": samples,
        "train_samples": train_samples,
        "seqlen": seqlen,
        "group": group_size,
    }
    claim_folder(out, shared)
    data = dataset, samples, train_samples, seqlen, group_size
    scores = perplexity, context, windows, limits(tasks, limit), include_path
    bench = Bench(model, out, *data, *scores, peers_python)
    try:
        full = {"method": "16-bit"} | bench.score(model, out / "16-bit")
    except LeftOut as reason:
        sys.exit(f"the 16-bit model: {reason}")
    rows, left_out = measure_rows(bench, bits, seed, only)
    record = {
        "command": command(),
        "model": model.name,
        "versions": versions("torch", "transformers"),
        "rows": [full, *rows],
        "left_out": left_out,
    }
    table = table_of(full, rows)
    finish(console, record, as_json, [table], lambda: plot(full, rows), table)
