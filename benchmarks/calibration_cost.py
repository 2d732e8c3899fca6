"""Time and memory of a calibration: a few decoder layers of a known shape, with random weights and random text.

    python benchmarks/calibration_cost.py llama2-7b --blocks 2 --device cuda --work FOLDER --json FILE

FOLDER gets the 16-bit model, its checkpoint, and `text.txt`, which the model has sampled itself: `parity.py FOLDER/bq2
--perplexity FOLDER/text.txt` then compares vLLM with transformers without any data.
"""

from __future__ import annotations

import shutil
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import torch
import typer

WORDS = 100_000  # of random calibration text; each is a token
SAMPLED_ROWS, SAMPLED_TOKENS, TOP_K = 16, 160, 20

app = typer.Typer(add_completion=False)


def _words(tokens: torch.Tensor) -> str:
    return " ".join(f"t{token}" for token in tokens.flatten().tolist())


def write_model(shape: str, blocks: int, experts: int | None, folder: Path, device: str) -> None:
    """Write a model with so many decoder layers and random weights, a tokenizer of numbers, and a text that it samples.

    Args:
        shape: a name of the serving benchmark's shapes.
        blocks: decoder layers.
        experts: of a mixture; as many as the shape has by default.
        folder: gets `fp16` and `text.txt`.
        device: where the text is sampled.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from benchmarks.vllm_serving.models import read_config, write_tokenizer

    config, _ = read_config(shape)
    config |= {"num_hidden_layers": blocks} | ({"num_experts": experts} if experts else {})
    chosen = AutoConfig.for_model(**{name: value for name, value in config.items() if name != "architectures"})
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(chosen, dtype=torch.float16 if device != "cpu" else torch.bfloat16)
    model.eval().save_pretrained(folder / "fp16")
    saved = (folder / "fp16" / "config.json").read_text()
    write_tokenizer(folder / "fp16", config)
    (folder / "fp16" / "config.json").write_text(saved)  # the tokenizer's would lack what transformers adds
    start = torch.randint(config["vocab_size"], (SAMPLED_ROWS, 1), device=device)
    sampled = model.generate(
        start, do_sample=True, top_k=TOP_K, min_new_tokens=SAMPLED_TOKENS, max_new_tokens=SAMPLED_TOKENS, pad_token_id=0
    )
    (folder / "text.txt").write_text(_words(sampled))


@app.command(help=__doc__)
def main(
    shape: Annotated[str, typer.Argument(help="As for serving.py: llama2-7b, …, smoke.")] = "llama2-7b",
    blocks: Annotated[int, typer.Option(help="Decoder layers.")] = 2,
    experts: Annotated[int | None, typer.Option(help="Experts of a mixture; all by default.")] = None,
    device: Annotated[str, typer.Option(help="As for bq-calibrate.")] = "cuda",
    recipe: Annotated[str, typer.Option(help="As for bq-calibrate.")] = "fast",
    samples: Annotated[int, typer.Option(help="Sequences.")] = 64,
    seqlen: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    memory_budget: Annotated[float | None, typer.Option(help="GB, as for bq-calibrate.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for `fp16` and `bq2`, which are replaced.")] = Path(
        "build/calibration_cost"
    ),
    as_json: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/calibration_cost.json"),
) -> None:
    """Make the model, calibrate it, write what it took."""
    from bq_calibration import calibrate

    from benchmarks.harness.provenance import command
    from benchmarks.harness.results import write_json

    work.mkdir(parents=True, exist_ok=True)
    for name in ("fp16", "bq2", "bq2.partial"):
        shutil.rmtree(work / name, ignore_errors=True)
    # in a process of its own: the memory that it takes is not the calibration's
    writing = get_context("spawn").Process(target=write_model, args=(shape, blocks, experts, work, device))
    writing.start()
    writing.join()
    if writing.exitcode:
        raise typer.Exit(writing.exitcode)
    random = work / "random.txt"
    random.write_text(_words(torch.randint(10_000, (WORDS,))))
    data = {"dataset": str(random), "samples": samples, "seqlen": seqlen}
    options = {"device": device, "memory_budget": memory_budget, "plots": False}
    report = calibrate(str(work / "fp16"), str(work / "bq2"), recipe, **options, **data)
    facts = report["run"]
    settings = {
        "shape": shape,
        "blocks": blocks,
        "experts": experts,
        "recipe": recipe,
        "samples": samples,
        "seqlen": seqlen,
        "memory_budget": memory_budget,
    }
    write_json(as_json, {"command": command(), "settings": settings, "run": facts, "totals": report["totals"]})
    memory = facts["peak_gpu_memory_bytes"]
    on_gpu = "" if memory is None else f", {memory / 2**30:.2f} GiB of GPU memory"
    host = facts["peak_memory_bytes"] / 2**30
    print(f"{facts['device']}: {facts['wall_seconds']} s for {blocks} decoder layers, {host:.2f} GiB{on_gpu}")


if __name__ == "__main__":
    app()
