"""The commands `bq-calibrate`, `bq-eval` and `bq-inspect`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .errors import UserError
from .recipes import RECIPES, Recipe, make_recipe

console, errors = Console(), Console(stderr=True)


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=errors)


def _run(command: Callable[..., None]) -> None:
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    try:
        app(standalone_mode=True)
    except UserError as error:
        errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


def _device(device: str) -> str:
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not available here ({str(error).splitlines()[0]})") from error
    return device


Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]


def calibrate(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face causal LM, or its name on the hub.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    recipe: Annotated[
        str, typer.Option(help=f"Named settings: {', '.join(RECIPES)}. Other flags override it.")
    ] = "fast",
    bits: Annotated[int | None, typer.Option(help="Bits per weight code: 2, 3 or 4.")] = None,
    target_bpw: Annotated[
        float | None, typer.Option(help="Bits a weight, all counted, up to which sensitive layers get more bits.")
    ] = None,
    group_size: Annotated[int | None, typer.Option(help="Columns that share a scale; -1 for the whole row.")] = None,
    zero_point: Annotated[str | None, typer.Option(help="midrise or float.")] = None,
    rotation: Annotated[str | None, typer.Option(help="butterfly, hadamard or none.")] = None,
    rotation_block: Annotated[str | None, typer.Option(help="Features that a rotation mixes, or full.")] = None,
    init: Annotated[str | None, typer.Option(help="identity, hadamard or random.")] = None,
    objective: Annotated[
        str | None, typer.Option(help="What the angles minimise: output (the paper's) or gptq.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="adam, or sgd with a cosine schedule.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate of the angles.")] = None,
    steps: Annotated[int | None, typer.Option(help="Most steps a rotation is trained for.")] = None,
    uniformity: Annotated[float | None, typer.Option(help="Weight of the paper's uniformity term.")] = None,
    rounding: Annotated[str | None, typer.Option(help="rtn or gptq.")] = None,
    refine: Annotated[int | None, typer.Option(help="Sweeps that refine codes and scales after rounding.")] = None,
    reconstruct: Annotated[int | None, typer.Option(help="Steps of training of every block after rounding.")] = None,
    finetune: Annotated[int | None, typer.Option(help="Steps of end-to-end training, codes included.")] = None,
    distill: Annotated[int | None, typer.Option(help="Steps of end-to-end training, codes frozen.")] = None,
    tensor_parallel: Annotated[int | None, typer.Option(help="GPUs a layer must be able to be cut over.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="wikitext2, c4, self, a .txt/.jsonl/.parquet file; or several: A,B.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration sequences.")] = None,
    train_samples: Annotated[int | None, typer.Option(help="Sequences for training, of blocks and end to end.")] = None,
    held_out: Annotated[int | None, typer.Option(help="Sequences on which the report measures training.")] = None,
    seqlen: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.")] = None,
    device: Device = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
) -> None:
    """Turn a Hugging Face causal LM into a 2–4-bit butterfly checkpoint that vLLM serves."""
    given = {key: value for key, value in locals().items() if key in {f.name for f in fields(Recipe)}}
    overrides = {key: value for key, value in given.items() if value is not None}
    if rotation_block is not None:
        if rotation_block != "full" and not rotation_block.isdigit():
            raise UserError(f"--rotation-block {rotation_block}: expected a number or full")
        overrides["rotation_block"] = None if rotation_block == "full" else int(rotation_block)
    settings = make_recipe(recipe, overrides)
    from .calibrate import Calibration  # torch and transformers load only once the flags have been understood

    run = Calibration(str(model), str(out), settings, _device(device), resume)
    try:
        with _progress() as progress:
            run.run(progress)
    except KeyboardInterrupt:
        where = f"; finished blocks are kept in {run.staging}: continue with --resume" if run.staging.exists() else ""
        errors.print(f"interrupted{where}", soft_wrap=True)
        sys.exit(130)
    report = json.loads((out / "bq_report.json").read_text())
    totals = report["totals"]
    console.print(
        f"{out}: {totals['bits_per_weight']:.3f} bits per weight, {totals['checkpoint_bytes'] / 1e6:.1f} MB "
        f"(16-bit: {totals['source_bytes'] / 1e6:.1f} MB), {report['run']['wall_seconds']:.0f} s, "
        f"peak {report['run']['peak_memory_bytes'] / 1e9:.2f} GB",
        soft_wrap=True,
    )


def evaluate(
    model: Annotated[str, typer.Argument(help="A butterfly checkpoint, or any Hugging Face causal LM.")],
    perplexity: Annotated[str | None, typer.Option(help="wikitext2, c4, or a .txt/.jsonl/.parquet file.")] = None,
    context: Annotated[int, typer.Option(help="Tokens a perplexity window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Only the first windows; all by default.")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, separated by commas.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of further lm-eval task files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first documents of each task.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    output: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    device: Device = "auto",
) -> None:
    """Perplexity and zero-shot accuracy of a checkpoint or a 16-bit model."""
    if not perplexity and not tasks:
        raise UserError("nothing to do: give --perplexity and/or --tasks")
    from .evaluate import Evaluator

    with _progress() as progress:
        evaluator = Evaluator(model, dtype, _device(device))
        results = {"model": model, "dtype": str(evaluator.model.dtype).removeprefix("torch.")}
        if perplexity:
            results["perplexity"] = evaluator.perplexity(perplexity, context, windows, progress)
    if tasks:
        results["tasks"] = evaluator.tasks(tasks.split(","), include_path, limit)
    table = Table("measure", "value", "± standard error")
    if perplexity:
        p = results["perplexity"]
        table.add_row(f"perplexity, {p['dataset']}, context {context}, {p['windows']} windows", f"{p['value']:.3f}", "")
    for name, task in results.get("tasks", {}).items():
        table.add_row(f"{name}, {task['metric']}", f"{task['value']:.4f}", f"{task['stderr']:.4f}")
    console.print(table)
    if output:
        from .checkpoint import write_json

        write_json(output, results)


def inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a butterfly checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Verify every tensor of a checkpoint; print its schema, sizes, bits per weight and per-layer error."""
    from .inspect import describe, print_description

    description = describe(checkpoint)
    if as_json:
        print(json.dumps(description, indent=2))
    else:
        print_description(description, console)


def calibrate_main() -> None:
    """Entry point of `bq-calibrate`."""
    _run(calibrate)


def evaluate_main() -> None:
    """Entry point of `bq-eval`."""
    _run(evaluate)


def inspect_main() -> None:
    """Entry point of `bq-inspect`."""
    _run(inspect)
