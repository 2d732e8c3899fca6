"""Methods of the accuracy table that packages bring: `auto-round` and `llmcompressor`, with their own levels.

    python benchmarks/baselines/third_party/packages.py auto-round MODEL -o OUT --tokens tokens.safetensors [--bits 2]

OUT is an ordinary dense checkpoint in the dtype in which the package leaves the weights, fake-quantized, with
`peer.json` beside it. The script imports nothing of this project, since it may run in an environment of its own:

    pip install auto-round llmcompressor typer

It has a folder of its own, since a script's folder comes first on sys.path: beside it, awq.py would hide the package
`awq`.
"""

from __future__ import annotations

import json
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

STARTED = time.monotonic()
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Model = Annotated[Path, typer.Argument(help="The 16-bit model.")]
Out = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
Tokens = Annotated[Path, typer.Option(help="Safetensors file with int64 `tokens` [samples, seqlen].")]
Bits = Annotated[int, typer.Option(help="Bits per weight code.")]
GroupSize = Annotated[int, typer.Option(help="Columns that share a scale.")]
Asym = Annotated[bool, typer.Option("--asym", help="An integer zero point per group, `bits` bits wide.")]


def quantized_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the decoder layers, by name: those that every method of the table quantizes."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in name}


def most_levels(weight: torch.Tensor, group: int) -> int:
    """The largest number of different values in a group of a weight [N, K]."""
    ordered = weight.detach().unflatten(1, (-1, group)).sort(-1).values
    return 1 + int((ordered.diff(dim=-1) != 0).sum(-1).max())


def write_facts(
    folder: Path, name: str, tokens: torch.Tensor, bits: int, group: int, asym: bool, resumed: bool = False
) -> None:
    """Write `peer.json`: what a row of the table shows beside its scores, under the names that `bq_report.json` uses.

    Bits per weight count the codes, a 16-bit scale per group, and with `asym` an integer zero point per group.

    Args:
        folder: of the checkpoint.
        name: method or package.
        tokens: int64 [samples, seqlen], of the calibration.
        bits: bits per code.
        group: columns that share a scale.
        asym: whether groups have zero points.
        resumed: whether this process finished the work of an earlier one, whose time and memory are not counted.
    """
    on_gpu = torch.cuda.is_available()
    facts = {
        "name": name,
        "calibration_tokens": tokens.numel(),
        "totals": {"bits_per_weight": bits + (16 + bits * asym) / group},
        "run": {
            "wall_seconds": round(time.monotonic() - STARTED, 1),
            "resumed": resumed,
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
            "python": platform.python_version(),
            "versions": {name: version(name) for name in ("torch", "transformers")},
        },
    }
    (folder / "peer.json").write_text(json.dumps(facts, indent=2) + "\n")


def write(
    model: nn.Module, source: Path, out: Path, package: str, tokens: torch.Tensor, bits: int, group: int, asym: bool
) -> None:
    """Write the fake-quantized model, whole or not at all.

    The levels of every group are counted: a layer that the package left out, or grouped otherwise, is an error.

    Raises:
        SystemExit: if a group has too many levels.
    """
    for name, layer in quantized_layers(model).items():
        found = most_levels(layer.weight, group)
        if found > 2**bits:
            raise SystemExit(f"{package}: {name} has {found} levels in a group, not {2**bits}")
    staging = out.with_name(out.name + ".partial")
    model.save_pretrained(staging)
    AutoTokenizer.from_pretrained(source).save_pretrained(staging)
    write_facts(staging, f"{package} {version(package)}", tokens, bits, group, asym)
    staging.rename(out)


@app.command("auto-round")
def auto_round(
    model: Model,
    out: Out,
    tokens: Tokens,
    bits: Bits = 2,
    group_size: GroupSize = 64,
    asym: Asym = False,
    iters: Annotated[int, typer.Option(help="Steps per block.")] = 200,
) -> None:
    """AutoRound (arXiv 2309.05516) as the package has it: signed gradient descent on rounding and clipping."""
    from auto_round import AutoRound, QuantizationScheme

    rows = load_file(tokens)["tokens"]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    scheme = QuantizationScheme(bits=bits, group_size=group_size, sym=not asym, data_type="int", act_bits=16)
    tuned, _ = AutoRound(
        loaded,
        AutoTokenizer.from_pretrained(model),
        scheme=scheme,
        dataset=[{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows],
        iters=iters,
        nsamples=len(rows),
        seqlen=rows.shape[1],
        device_map="cuda" if torch.cuda.is_available() else "cpu",
    ).quantize()
    write(tuned, model, out, "auto-round", rows, bits, group_size, asym)


@app.command("llm-compressor")
def llm_compressor(
    model: Model,
    out: Out,
    tokens: Tokens,
    bits: Bits = 2,
    group_size: GroupSize = 64,
    asym: Asym = False,
    method: Annotated[str, typer.Option(help="rtn, gptq or awq.")] = "gptq",
) -> None:
    """RTN, GPTQ (arXiv 2210.17323) and AWQ (arXiv 2306.00978) as llm-compressor has them, with min-max levels."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier
    from llmcompressor.pipelines.cache import IntermediatesCache

    if not torch.cuda.is_available():  # AWQ pins memory for copies to a GPU, even where there is none, and fails
        IntermediatesCache.pin_memory = lambda *_: None
    rows = load_file(tokens)["tokens"]
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    weights = {"num_bits": bits, "type": "int", "symmetric": not asym, "strategy": "group", "group_size": group_size}
    scheme = {"ignore": ["lm_head"], "config_groups": {"all": {"targets": ["Linear"], "weights": weights}}}
    recipes = {
        "rtn": lambda: [QuantizationModifier(**scheme)],
        "gptq": lambda: [GPTQModifier(**scheme)],
        "awq": lambda: [AWQModifier(), QuantizationModifier(**scheme)],
    }
    oneshot(
        model=loaded,
        tokenizer=AutoTokenizer.from_pretrained(model),
        dataset=Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()}),
        recipe=recipes[method](),
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
    )
    dense = AutoModelForCausalLM.from_pretrained(model, dtype="auto")  # `loaded` would save itself compressed
    kept = loaded.state_dict()
    dense.load_state_dict({name: kept[name] for name in dense.state_dict()})
    with torch.no_grad():
        for name, layer in quantized_layers(dense).items():
            q = loaded.get_submodule(name)
            layer.weight.copy_(
                fake_quantize(q.weight, q.weight_scale, q.weight_zero_point, q.quantization_scheme.weights)
            )
    write(dense, model, out, "llmcompressor", rows, bits, group_size, asym)


if __name__ == "__main__":
    app()
