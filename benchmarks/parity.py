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

import typer
from bq_calibration.data import load_documents, tokenize
from rich.console import Console
from rich.progress import track
from rich.table import Table

BATCH = 4  # windows a call: enough to keep vLLM busy, few enough for a progress bar


def served_perplexity(model: str, dataset: str, context: int, windows: int) -> float:
    """Perplexity by vLLM over the windows that `bq-eval` reads, from the log-probabilities of the prompt's tokens."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    tokens = tokenize(AutoTokenizer.from_pretrained(model), "\n\n".join(load_documents(dataset, "test")))
    prompts = [{"prompt_token_ids": tokens[i * context : (i + 1) * context]} for i in range(windows)]
    llm = LLM(model=model, max_model_len=context + 1, enforce_eager=True, enable_prefix_caching=False)
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    total = 0.0
    for start in track(range(0, windows, BATCH), "vLLM"):
        for result in llm.generate(prompts[start : start + BATCH], asked, use_tqdm=False):
            following = zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True)
            total -= sum(logprobs[token].logprob for token, logprobs in following)
    return math.exp(total / (windows * (context - 1)))


def main(
    model: Annotated[str, typer.Argument(help="A butterfly checkpoint, or any Hugging Face causal LM.")],
    perplexity: Annotated[str, typer.Option(help="Evaluation data, as for bq-eval.")] = "wikitext2",
    context: Annotated[int, typer.Option(help="Tokens a perplexity window.")] = 2048,
    windows: Annotated[int | None, typer.Option(help="Only the first windows; all by default.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the results to this file.")] = None,
) -> None:
    """Evaluate with both, in the checkpoint's dtype, and print them side by side."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    with TemporaryDirectory() as folder:
        kept = Path(folder) / "scores.json"
        command = [Path(sys.executable).parent / "bq-eval", model, "--perplexity", perplexity, "--context", context]
        command += ["--json", kept, *(["--windows", windows] if windows else [])]
        if code := subprocess.run([str(part) for part in command], check=False).returncode:
            sys.exit(code)
        found = json.loads(kept.read_text())["perplexity"]
    found["vllm"] = served_perplexity(model, perplexity, context, found["windows"])
    ratio = found["vllm"] / found["value"]
    table = Table(f"perplexity, {Path(perplexity).name}, {found['windows']} windows of {context}", "value")
    table.add_row("transformers", f"{found['value']:.4f}")
    table.add_row("vLLM", f"{found['vllm']:.4f}")
    table.add_row("vLLM against transformers", f"{ratio - 1:+.3%}")
    Console().print(table)
    if as_json:
        as_json.write_text(json.dumps(found | {"model": Path(model).name, "ratio": ratio}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
