"""From a Hugging Face causal LM to a butterfly checkpoint: calibration, conversion, evaluation and inspection.

`calibrate`, `convert`, `evaluate` and `inspect` are the commands `bq-calibrate`, `bq-convert`, `bq-eval` and
`bq-inspect` as functions.
Importing this package loads neither torch nor transformers; the first call does.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

try:
    __version__ = version("bq-vllm")
except PackageNotFoundError:  # used from a source folder on PYTHONPATH
    __version__ = "unknown"

__all__ = ["calibrate", "convert", "evaluate", "inspect"]


def calibrate(
    model: str,
    out: str,
    recipe: str = "fast",
    *,
    device: str = "auto",
    compute_dtype: str = "auto",
    memory_budget: float | None = None,
    resume: bool = False,
    extend: str | None = None,
    keep_work: bool = False,
    dry_run: bool = False,
    plots: bool = True,
    progress: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Turn a Hugging Face causal LM into a 2–4-bit butterfly checkpoint that vLLM serves.

    Started by torchrun, several processes share the work; each returns the report.

    Progress is logged to `OUT.log` and through the logger `bq_calibration`, a line per decoder layer.

    >>> from bq_calibration import calibrate
    >>> report = calibrate("tiny-llama", "tiny-llama-bq2", dataset="text.txt", samples=4, seqlen=32, group_size=32,
    ...                    rotation_block=32)
    >>> 2 < report["totals"]["bits_per_weight"] < 5
    True

    Args:
        model: folder of the 16-bit model, or its name on the hub.
        out: folder to write; must not exist.
        recipe: `fast`, `best`, `max` or `paper`.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, …
        compute_dtype: `auto`, `float32`, `bfloat16` or `float16`.
        memory_budget: GB that each process may take, of the GPU's memory where it computes there; by default most of
            what is free.
        resume: go on where an interrupted run stopped.
        extend: work that a run of fewer `train_tokens` has kept; this one trains on from there.
        keep_work: leave the run's work in `OUT.work`.
        dry_run: only check everything, and return the cost of the run.
        plots: draw pictures of the report into the checkpoint.
        progress: show progress bars on stderr.
        **settings: fields of `recipes.Recipe` that replace the recipe's.

    Returns:
        the report, as in `bq_report.json`; of a dry run the plan, see `preflight.Plan`.

    Raises:
        UserError: when the model, a setting or the output folder will not do; the message says what to do.
    """
    from pathlib import Path

    from .console import make_progress
    from .recipes import make_recipe

    chosen = make_recipe(recipe, settings)
    from . import parallel
    from .pipeline import Calibration

    budget = None if memory_budget is None else int(memory_budget * 1e9)
    work = (None if extend is None else Path(extend)), keep_work
    with parallel.joined(device) as own_device, make_progress(progress) as bars:
        run = Calibration(model, out, chosen, own_device, resume, plots, compute_dtype, budget, *work)
        return run.dry_run(bars) if dry_run else run.run(bars)


def convert(
    source: str, out: str, *, method: str | None = None, resume: bool = False, progress: bool = False
) -> dict[str, Any]:
    """Bring a checkpoint of another package into the format, every weight the same number; refuse what cannot be.

    >>> from bq_calibration import convert
    >>> report = convert("tiny-llama-gptq", "tiny-llama-converted")
    >>> report["conversion"]["method"], report["totals"]["bits_per_weight"]
    ('GPTQ, packed as gptq', 3.0)

    Args:
        source: folder or hub name of a checkpoint of GPTQ, AutoRound, AWQ or compressed-tensors, or a GGUF file.
        out: folder to write; must not exist.
        method: `efficientqat` for a checkpoint of EfficientQAT, whose config.json does not say so.
        resume: go on where an interrupted run stopped.
        progress: show progress bars on stderr.

    Returns:
        the report, as in `bq_report.json`.

    Raises:
        UserError: naming what the format cannot hold exactly, before anything is written.
    """
    from .console import make_progress
    from .conversion.pipeline import Conversion

    with make_progress(progress) as bars:
        return Conversion(source, out, method, resume).run(bars)


def evaluate(
    model: str,
    *,
    perplexity: str | None = None,
    context: int = 2048,
    windows: int | None = None,
    tasks: str | None = None,
    include_path: str | None = None,
    limit: int | None = None,
    device: str = "auto",
    compute_dtype: str = "auto",
    progress: bool = False,
) -> dict[str, Any]:
    """Perplexity and zero-shot accuracy of a butterfly checkpoint or a 16-bit model.

    >>> from bq_calibration import evaluate
    >>> result = evaluate("tiny-llama", perplexity="text.txt", context=64, windows=4)
    >>> result["perplexity"]["windows"], result["perplexity"]["value"] > 1
    (4, True)

    Args:
        model: folder or hub name.
        perplexity: `wikitext2`, `c4`, or a .txt, .jsonl or .parquet file.
        context: tokens per window.
        windows: only the first windows; all by default.
        tasks: lm-eval tasks, separated by commas.
        include_path: folder of further lm-eval task files.
        limit: only the first documents of each task.
        device: as for `calibrate`.
        compute_dtype: as for `calibrate`.
        progress: show progress bars on stderr.

    Returns:
        `model`, `dtype`, and `perplexity` and `tasks` where asked for.

    Raises:
        UserError: if there is nothing to measure, or the model, the data or a task will not do.
    """
    from .console import check_device, make_progress
    from .errors import UserError

    if not perplexity and not tasks:
        raise UserError("nothing to do: give --perplexity and/or --tasks")
    for name, value, least in (("--context", context, 2), ("--windows", windows, 1), ("--limit", limit, 1)):
        if value is not None and value < least:
            raise UserError(f"{name} {value}: expected at least {least}")
    from .compute import dtype_name
    from .evaluation import Evaluator

    with make_progress(progress) as bars:
        evaluator = Evaluator(model, compute_dtype, check_device(device))
        results: dict[str, Any] = {"model": model, "dtype": dtype_name(evaluator.model.dtype)}
        if perplexity:
            results["perplexity"] = evaluator.perplexity(perplexity, context, windows, bars)
    if tasks:
        results["tasks"] = evaluator.tasks(tasks.split(","), include_path, limit)
    return results


def inspect(checkpoint: str) -> dict[str, Any]:
    """Verify every tensor of a checkpoint; its schema, sizes, bits per weight and the report of its run.

    >>> from bq_calibration import inspect
    >>> inspect("tiny-llama-bq2")["quantization_config"]["bits"]
    2

    Raises:
        UserError: naming the first tensor that breaks the format.
    """
    from pathlib import Path

    from .inspection import describe

    return describe(Path(checkpoint))
