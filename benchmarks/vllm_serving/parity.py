"""Perplexity of a checkpoint as vLLM serves it beside that of transformers: what was calibrated is what is served.

python benchmarks/parity.py CHECKPOINT --perplexity wikitext2 [--context 2048] [--windows 8] [--json FILE]
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from bq_calibration.compute import dtype_name, native_dtype
from bq_calibration.data import cut_windows, load_documents
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.harness.results import write_json

BATCH = 4  # windows per call: enough to keep vLLM busy, few enough for a progress bar

app = typer.Typer(add_completion=False)


def serving_dtype(model: str) -> str:
    """`--dtype` for vLLM: the checkpoint's own; on a CPU that does not multiply it natively, float32."""
    if torch.cuda.is_available():
        return "auto"
    from transformers import AutoConfig

    stored = AutoConfig.from_pretrained(model).dtype or torch.bfloat16
    return dtype_name(native_dtype(stored, "cpu"))


def served_perplexity(model: str, dataset: str, context: int, windows: int) -> float:
    """Perplexity by vLLM over the windows that `bq-eval` reads, from the log-probabilities of the prompt's tokens."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    text = "\n\n".join(load_documents(dataset, "test"))
    rows = cut_windows(AutoTokenizer.from_pretrained(model), text, context)[:windows]
    prompts = [{"prompt_token_ids": row} for row in rows]
    llm = LLM(
        model=model,
        dtype=serving_dtype(model),
        max_model_len=context + 1,
        enforce_eager=True,
        enable_prefix_caching=False,
    )
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    total = 0.0
    for start in track(range(0, windows, BATCH), "vLLM"):
        for result in llm.generate(prompts[start : start + BATCH], sampling, use_tqdm=False):
            following = zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True)
            total -= sum(logprobs[token].logprob for token, logprobs in following)
    return math.exp(total / (windows * (context - 1)))


def _perplexity_by_transformers(model: str, dataset: str, context: int, windows: int | None) -> dict:
    """What `bq-eval` finds, in a process of its own; ends this one where it fails."""
    with TemporaryDirectory() as folder:
        scores = Path(folder) / "scores.json"
        # not the command: the project may be there by PYTHONPATH alone
        call = [sys.executable, "-c", "from bq_calibration.cli import evaluate_main; evaluate_main()", model]
        call += ["--perplexity", dataset, "--context", context]
        call += ["--json", scores, *(["--windows", windows] if windows else [])]
        if code := subprocess.run([str(part) for part in call], check=False).returncode:
            sys.exit(code)
        return json.loads(scores.read_text())["perplexity"]


@app.command(help=__doc__)
def main(
    model: Annotated[str, typer.Argument(help="A butterfly checkpoint, or any Hugging Face causal LM.")],
    perplexity: Annotated[str, typer.Option(help="Evaluation data, as for bq-eval.")] = "wikitext2",
    context: Annotated[int, typer.Option(help="Tokens per perplexity window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Only the first windows; all by default.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Evaluate with both, in the checkpoint's dtype where the device multiplies it natively, and print both."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GiB; vLLM's default is nearly all of a machine's memory
    result = _perplexity_by_transformers(model, perplexity, context, windows)
    result["vllm"] = served_perplexity(model, perplexity, context, result["windows"])
    result |= {"model": Path(model).name, "ratio": result["vllm"] / result["value"]}
    table = Table(f"perplexity, {Path(perplexity).name}, {result['windows']} windows of {context}", "value")
    table.add_row("transformers", f"{result['value']:.4f}")
    table.add_row("vLLM", f"{result['vllm']:.4f}")
    table.add_row("vLLM against transformers", f"{result['ratio'] - 1:+.3%}")
    Console().print(table)
    if as_json:
        write_json(as_json, result)
