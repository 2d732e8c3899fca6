"""Perplexity by tokens of end-to-end training: one run that is extended from rung to rung.

    python benchmarks/ladder.py MODEL --rungs 4M,12M,32M --perplexity wikitext2,c4 [--set mix=c4:2,self:4]

Learning rates stay at their peak up to the last fifth of every rung (`--schedule wsd`), so that a rung costs what it
adds to the one before, and its own last fifth. Every rung is a checkpoint. OUT keeps all; an interrupted ladder goes on
there.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from bq_calibration import calibrate, evaluate
from bq_calibration.data import dataset_name
from bq_calibration.schedule import parse_tokens
from rich.console import Console

from benchmarks.harness.provenance import claim_folder, command, versions
from benchmarks.harness.results import finish
from benchmarks.harness.settings import parsed
from benchmarks.training_ladder.report import plot, table_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def scores(model: str, texts: list[str], context: int, windows: int | None, device: str) -> dict[str, float]:
    """Perplexity by text."""
    found = {}
    for text in texts:
        result = evaluate(model, perplexity=text, context=context, windows=windows, device=device)
        found[dataset_name(text)] = result["perplexity"]["value"]
    return found


def rung(
    model: str, out: Path, tokens: int, before: Path | None, recipe: str, settings: dict[str, Any], device: str
) -> dict[str, Any]:
    """Train up to so many tokens: what the run says of itself."""
    folder = out / f"{tokens}"
    if not (folder / "config.json").exists():
        kept = None if before is None else str(before.with_name(before.name + ".work"))
        own = {"train_tokens": tokens, "train_codes": True, "schedule": "wsd"} | settings
        calibrate(model, str(folder), recipe, device=device, extend=kept, keep_work=True, resume=True, **own)
    report = json.loads((folder / "bq_report.json").read_text())
    stage = report["stages"][-1]
    return {
        "tokens": tokens,
        "bits_per_weight": report["totals"]["bits_per_weight"],
        "held_out_divergence": stage.get("held_out_divergence"),
        "seconds": report["run"]["wall_seconds"],
        "plan": stage["plan"],
        "device": report["run"]["device"],
        "peak_gpu_memory_bytes": report["run"]["peak_gpu_memory_bytes"],
    }


@app.command(help=__doc__)
def main(
    model: Annotated[str, typer.Argument(help="The 16-bit model.")],
    rungs: Annotated[str, typer.Option(help="Tokens of training, rising.")] = "4M,12M,32M",
    recipe: Annotated[str, typer.Option(help="As for bq-calibrate.")] = "best",
    settings: Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE of a recipe's setting.")] = None,
    perplexity: Annotated[str, typer.Option(help="Test texts as for bq-eval, by commas.")] = "wikitext2,c4",
    context: Annotated[int, typer.Option(help="Tokens per window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Only the first windows.")] = None,
    device: Annotated[str, typer.Option(help="As for bq-calibrate.")] = "auto",
    minutes: Annotated[float, typer.Option(help="No rung is begun after that time.")] = float("inf"),
    out: Annotated[Path, typer.Option(help="Folder of the checkpoints.")] = Path("build/ladder"),
    as_json: Annotated[Path | None, typer.Option("--json", help="Results; OUT/results.json by default.")] = None,
) -> None:
    """The command."""
    started, console, given = time.monotonic(), Console(), parsed(settings or [])
    tokens = [parse_tokens(rung) for rung in rungs.split(",")]
    if tokens != sorted(set(tokens)):
        raise typer.BadParameter(f"--rungs {rungs}: expected rising numbers")
    texts = perplexity.split(",")
    claim_folder(out, {"model": model, "recipe": recipe, "settings": given, "context": context, "windows": windows})
    record: dict[str, Any] = {
        "command": command(),
        "versions": versions("torch", "transformers", "triton", "torchao"),
        "context": context,
        "windows": windows,
        "source": scores(model, texts, context, windows, device),
        "rungs": [],
        "left_out": {},
    }
    before = None
    for number in tokens:
        if time.monotonic() - started > 60 * minutes:
            record["left_out"][f"{number} tokens"] = "no time left; run again to go on"
            continue
        row = rung(model, out, number, before, recipe, given, device)
        before = out / f"{number}"
        row["perplexity"] = scores(str(before), texts, context, windows, device)
        record["rungs"].append(row)
        console.print(f"{number} tokens: {row['perplexity']}, KL {row['held_out_divergence']}, {row['seconds']} s")
    table = table_of(record)
    finish(console, record, as_json or out / "results.json", [table], lambda: plot(record), table)
