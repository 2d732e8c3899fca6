"""The commands `bq-calibrate`, `bq-convert`, `bq-eval`, `bq-inspect`: flags in, the functions of this package."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect as signatures
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from . import __version__, calibrate, convert, evaluate, inspect
from .console import is_first, stderr, stdout
from .errors import UserError, check_writable
from .logs import log_to, quieten_libraries
from .recipes import RECIPES, Recipe, flag, make_recipe
from .schedule import parse_tokens


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"bq-vllm {__version__}")
        raise typer.Exit


RUN = "Run"  # the section of --help that is not about the recipe
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …", rich_help_panel=RUN)]
ComputeDtype = Annotated[
    str,
    typer.Option(
        "--compute-dtype",
        help="auto (16 bits where the device multiplies them natively, else float32), float32, bfloat16 or float16.",
        rich_help_panel=RUN,
    ),
]
Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]


def _run(command: Callable[..., None]) -> None:
    quieten_libraries()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(context_settings={"help_option_names": ["-h", "--help"]})(command)
    try:
        app(standalone_mode=True)
    except UserError as error:
        if not (is_first() or "torch" in sys.modules):  # flags are wrong in every process; later errors only one tells
            sys.exit(1)
        words = " ".join(str(error).splitlines())  # a library's own words may take several lines
        stderr.print(f"error: {words}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)


# ---- bq-calibrate: the flags of a recipe are its fields


def _recipe_help(field: dataclasses.Field) -> str:
    """The text of a setting's flag, with its value in every recipe."""
    values = {name: getattr(recipe, field.name) for name, recipe in RECIPES.items()}
    shown = {name: field.metadata["unset"] if value is None else value for name, value in values.items()}
    if len(set(shown.values())) == 1:
        defaults = next(iter(shown.values()))
    else:
        defaults = ", ".join(f"{name} {value}" for name, value in shown.items())
    choices = "|".join(map(str, field.metadata["choices"]))
    return f"{field.metadata['text']}{f' {choices}.' if choices else ''} ({defaults})"


def _recipe_flag(field: dataclasses.Field) -> signatures.Parameter:
    types = {
        "int": int,
        "float": float,
        "float | None": float,
        "str": str,
        "str | None": str,
        "int | None": str,  # or a word
        "bool": bool,
    }
    kind = types[field.type]
    tokens = {"parser": parse_tokens, "metavar": "TOKENS"} if field.metadata["tokens"] else {}
    option = typer.Option(
        help=_recipe_help(field), rich_help_panel=field.metadata["section"], show_default=False, **tokens
    )
    annotation = Annotated[kind | None, option]
    return signatures.Parameter(field.name, signatures.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def number_or_word(field: dataclasses.Field, text: str) -> int | None:
    """The value of a flag that takes a number, or a word for None.

    Raises:
        UserError: for anything else.
    """
    word = field.metadata["unset"]
    if text != word and not text.removeprefix("-").isdigit():
        raise UserError(f"{flag(field.name)} {text}: expected a number or {word}")
    return None if text == word else int(text)


def _with_recipe_flags(command: Callable[..., None]) -> Callable[..., None]:
    """The command with a flag for every field of Recipe in place of its `**settings`."""
    *own, _ = signatures.signature(command, eval_str=True).parameters.values()
    own = [parameter.replace(kind=signatures.Parameter.KEYWORD_ONLY) for parameter in own]
    flags = own + [_recipe_flag(field) for field in dataclasses.fields(Recipe)]
    command.__signature__ = signatures.Signature(flags)
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in flags}
    return command


@_with_recipe_flags
def _calibrate(
    model: Annotated[str, typer.Argument(help="Folder of a Hugging Face causal LM, or its name on the hub.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.", rich_help_panel=RUN)],
    recipe: Annotated[
        str,
        typer.Option(help=f"Named settings: {', '.join(RECIPES)}. Other flags override it.", rich_help_panel=RUN),
    ] = "fast",
    device: Device = "auto",
    compute_dtype: ComputeDtype = "auto",
    memory_budget: Annotated[
        float | None,
        typer.Option(
            help="GB that each process may take, of its GPU where it has one; most of what is free by default.",
            rich_help_panel=RUN,
            min=0,
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where an interrupted run stopped.", rich_help_panel=RUN)
    ] = False,
    extend: Annotated[
        Path | None,
        typer.Option(help="OUT.work of a run with fewer --train-tokens: train on from there.", rich_help_panel=RUN),
    ] = None,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Leave OUT.work behind, to be extended.", rich_help_panel=RUN)
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Only check everything and print its cost.", rich_help_panel=RUN),
    ] = False,
    plots: Annotated[bool, typer.Option(help="Draw pictures of the report.", rich_help_panel=RUN)] = True,
    version: Version = False,
    **settings: Any,
) -> None:
    """Turn a Hugging Face causal LM into a 2–4-bit butterfly checkpoint that vLLM serves.

    Defaults stand in parentheses behind each flag, by recipe where recipes differ.
    """
    overrides = {name: value for name, value in settings.items() if value is not None}
    for field in dataclasses.fields(Recipe):
        if field.type == "int | None" and field.name in overrides:
            overrides[field.name] = number_or_word(field, overrides[field.name])
    make_recipe(recipe, overrides)  # flags are checked before torch and transformers load
    run = {"device": device, "compute_dtype": compute_dtype, "resume": resume, "plots": plots}
    run |= {"memory_budget": memory_budget, "extend": extend and str(extend), "keep_work": keep_work}
    try:
        with contextlib.nullcontext() if stderr.is_terminal and is_first() else log_to(None):
            report = calibrate(
                model, str(out), recipe, dry_run=dry_run, progress=stderr.is_terminal, **run, **overrides
            )
    except KeyboardInterrupt:
        unfinished = out.with_name(out.name + ".partial")
        hint = f"; finished blocks are kept in {unfinished}: continue with --resume" if unfinished.exists() else ""
        stderr.print(f"interrupted{hint}", soft_wrap=True)
        sys.exit(130)
    if not is_first():
        return
    if dry_run:
        stdout.print(_plan_table(report, out))
        return
    totals, facts = report["totals"], report["run"]
    stdout.print(
        f"{out}: {totals['bits_per_weight']:.3f} bits per weight, {totals['file_bits_per_weight']:.3f} in the whole "
        f"file, {totals['checkpoint_bytes'] / 1e6:.1f} MB "
        f"(16-bit: {totals['source_bytes'] / 1e6:.1f} MB), {facts['wall_seconds']:.0f} s, "
        f"peak {facts['peak_memory_bytes'] / 1e9:.2f} GB, computed in {facts['compute_dtype']['forward']}",
        soft_wrap=True,
    )


def _plan_table(plan: dict[str, Any], out: Path) -> Table:
    table = Table("dry run", f"{out}, nothing is written")
    held_out = f", {plan['held_out']} of them held out" if plan["held_out"] else ""
    table.add_row("windows of text", f"{plan['windows']} of {plan['seqlen']} tokens{held_out}")
    table.add_row("computed in", plan["compute_dtype"]["forward"])
    size = f"{plan['checkpoint_bytes'] / 1e6:.1f} MB, {plan['bits_per_weight']:.3f} bits per weight"
    table.add_row("checkpoint", f"{size}, {plan['file_bits_per_weight']:.3f} in the whole file")
    table.add_row("disk, unfinished work included", f"{plan['disk_bytes'] / 1e9:.2f} GB")
    table.add_row("memory, about", f"{plan['memory_bytes'] / 1e9:.1f} GB")
    if plan["seconds"] is not None:
        table.add_row("time, about", f"{plan['seconds'] / 60:.0f} minutes on this machine")
    return table


# ---- bq-convert, bq-eval and bq-inspect


def _convert(
    source: Annotated[
        str, typer.Argument(help="Checkpoint of GPTQ, AutoRound, AWQ or compressed-tensors, or a GGUF file.")
    ],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; must not exist.")],
    method: Annotated[
        str | None, typer.Option(help="efficientqat, whose config.json does not say so; others are found.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where an interrupted run stopped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    version: Version = False,
) -> None:
    """Bring a quantized checkpoint into the format without requantizing: every weight stays the same number.

    What the format cannot hold exactly is refused before anything is written.
    """
    try:
        report = convert(str(source), str(out), method=method, resume=resume, progress=stderr.is_terminal)
    except KeyboardInterrupt:
        stderr.print("interrupted; continue with --resume", soft_wrap=True)
        sys.exit(130)
    if as_json:
        print(json.dumps(report, indent=2))
        return
    totals, config = report["totals"], report["quantization_config"]
    stdout.print(
        f"{out}: {report['conversion']['method']}, {config['bits']} bits, groups of {config['group_size']}: "
        f"{totals['bits_per_weight']:.3f} bits per weight, {totals['checkpoint_bytes'] / 1e6:.1f} MB "
        f"(source: {totals['source_bytes'] / 1e6:.1f} MB), {report['run']['wall_seconds']:.0f} s",
        soft_wrap=True,
    )


def _evaluate(
    model: Annotated[str, typer.Argument(help="A butterfly checkpoint, or any Hugging Face causal LM.")],
    perplexity: Annotated[str | None, typer.Option(help="wikitext2, c4, or a .txt/.jsonl/.parquet file.")] = None,
    context: Annotated[int, typer.Option(help="Tokens per perplexity window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Only the first windows; all by default.")] = None,
    tasks: Annotated[str | None, typer.Option(help="lm-eval tasks, separated by commas.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="Folder of further lm-eval task files.")] = None,
    limit: Annotated[int | None, typer.Option(help="Only the first documents of each task.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
    compute_dtype: Annotated[
        str,
        typer.Option(
            "--compute-dtype",
            "--dtype",
            help="auto (the checkpoint's where the device multiplies it natively, else float32), float32, bfloat16 "
            "or float16.",
        ),
    ] = "auto",
    device: Device = "auto",
    version: Version = False,
) -> None:
    """Perplexity and zero-shot accuracy of a checkpoint or a 16-bit model."""
    if output:
        check_writable(output)  # before the work, not behind it
    results = evaluate(
        model,
        perplexity=perplexity,
        context=context,
        windows=windows,
        tasks=tasks,
        include_path=include_path,
        limit=limit,
        device=device,
        compute_dtype=compute_dtype,
        progress=stderr.is_terminal,
    )
    table = Table("measure", "value", "± standard error")
    if found := results.get("perplexity"):
        name = f"perplexity, {found['dataset']}, context {context}, {found['windows']} windows"
        table.add_row(name, f"{found['value']:.3f}", "")
    for name, task in results.get("tasks", {}).items():
        table.add_row(f"{name}, {task['metric']}", f"{task['value']:.4f}", f"{task['stderr']:.4f}")
    stdout.print(table)
    if output:
        from .files import write_json

        write_json(output, results)


def _inspect(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a butterfly checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    version: Version = False,
) -> None:
    """Verify every tensor of a checkpoint; print its schema, sizes, bits per weight and per-layer error."""
    description = inspect(str(checkpoint))
    if as_json:
        print(json.dumps(description, indent=2))
    else:
        from .inspection import print_description

        print_description(description, stdout)


def calibrate_main() -> None:
    """Entry point of `bq-calibrate`."""
    _run(_calibrate)


def convert_main() -> None:
    """Entry point of `bq-convert`."""
    _run(_convert)


def evaluate_main() -> None:
    """Entry point of `bq-eval`."""
    _run(_evaluate)


def inspect_main() -> None:
    """Entry point of `bq-inspect`."""
    _run(_inspect)
