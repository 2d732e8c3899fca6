"""Tokens per second of a running vLLM: this project beside fp16, QuaRot and vLLM's own 2- and 4-bit quantization.

    python benchmarks/serving.py llama2-7b [--rows fp16,butterfly-128] [--parts latency,prefill] [--profile]
    python benchmarks/serving.py llama2-7b --resume      measure what the last command left out

MODEL is a name below, any config.json (both with vLLM's dummy weights), or a checkpoint, which becomes a row beside
dummies of its shape. The rows:

    fp16               the unquantized model
    butterfly-128      ours, a learned rotation in blocks of 128 features, as wide as the groups of the 2-bit weights
    butterfly-full     ours, a rotation of the whole input
    no-rotation        the same kernels without a rotation: the difference is what rotations cost
    butterfly-128-norm    butterfly-128 with BQ_VLLM_FUSE_NORM=1; needs a GPU
    hadamard-128, -full   QuaRot: Hadamard of the same width online, and the same kernels
    vllm-hadamard-w2   QuaRot as vLLM offers it: compressed-tensors, 2 bits, Hadamard in blocks of 128
    vllm-w4            compressed-tensors at 4 bits with the kernel that vLLM picks (its name is printed)

The measuring tools are vLLM's own: `bench latency`, `bench throughput` and `bench serve`; a prefill is `bench latency`
with one long prompt and one token out. Each of them would start an engine, and an engine takes longer to start than to
measure; here all but `bench serve` are called from Python, on the one engine of the row. `bench serve` needs a server,
a second start that finds everything compiled. vLLM is imported once, in a process from which those of the rows are
forked. All engines get the same flags.

Rows are measured in order of importance, first latency and throughput of all, then serving. The rows that --minutes
does not suffice for, and those that fail, are named with the reason. Dummy weights are finite floats; packed codes,
which vLLM leaves as they were allocated, are filled with random bits, since memory full of zeros costs less power.
Logits are checked to be finite before anything is timed. On a CPU vLLM runs our rows as dense products, in bfloat16
where the CPU multiplies it natively, else in float32: there the table shows what a CPU serves, and nothing of the
kernels. `--smoke` asks so little of a tiny shape, or of MODEL, that times mean nothing at all.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bq_calibration.compute import dtype_name, native_dtype
from rich.console import Console

from benchmarks.harness.provenance import command
from benchmarks.harness.results import finish
from benchmarks.vllm_serving import report
from benchmarks.vllm_serving.engine import environment, offline, online
from benchmarks.vllm_serving.models import CHECKPOINT, GROUP, ROWS, SHAPES, read_config, write_tokenizer
from benchmarks.vllm_serving.processes import run_apart
from benchmarks.vllm_serving.session import Session, resumed
from benchmarks.vllm_serving.settings import PARTS, TOOLS, Settings, Task

GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # captured batch sizes: fewer than vLLM's default, to start sooner
LONGEST = 1024  # tokens of a request; longer prefills take longer ones
SMOKE_FLAGS = "--max-model-len 64 --max-num-seqs 4 --max-num-batched-tokens 64 --enforce-eager"

app = typer.Typer(add_completion=False)
console = Console(width=180)


def _numbers(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise typer.BadParameter(f"{text}: numbers, comma-separated")
    return [int(part) for part in text.split(",")]


def _pair(text: str) -> tuple[int, int]:
    if len(numbers := _numbers(text)) != 2:
        raise typer.BadParameter(f"{text}: two numbers, tokens in and out")
    return numbers[0], numbers[1]


def _chosen(text: str, known: tuple[str, ...]) -> list[str]:
    chosen = text.split(",")
    if unknown := set(chosen) - set(known):
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: known are {', '.join(known)}")
    return [name for name in known if name in chosen]


def engine_flags(smoke: bool, more: list[str], longest: int = LONGEST) -> tuple[str, ...]:
    """Flags of all engines: float16 on a GPU, on a CPU the dtype that it multiplies natively; `more` wins.

    Args:
        smoke: ask for as little as possible.
        more: further flags.
        longest: tokens of the longest request, in and out.
    """
    flags = ["--no-enable-prefix-caching", "--seed", "0"]
    if "--dtype" not in more:
        dtype = torch.float16 if torch.cuda.is_available() else native_dtype(torch.bfloat16, "cpu")
        flags += ["--dtype", dtype_name(dtype)]
    if smoke:
        flags += SMOKE_FLAGS.split()
    else:
        flags += ["--max-model-len", str(max(LONGEST, longest)), "--max-num-seqs", "256"]
        flags += ["--cudagraph-capture-sizes", *map(str, GRAPHS)]
    return (*flags, *more)


def _set_environment(smoke: bool) -> None:
    """Variables for vLLM's processes, which inherit them, and what they import before they are forked."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in local folders
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # lets a server call its worker's extension
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_PLUGINS", "butterfly")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    if smoke:
        # on a CPU, what an engine of its own process imports and what the sampler compiles takes longer than the rest
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    tools = [f"vllm.benchmarks.{name}" for name in TOOLS]
    multiprocessing.get_context("forkserver").set_forkserver_preload(["vllm", *tools])


def _new_record(model: str, settings: Settings, folder: Path, deadline: float) -> dict[str, Any]:
    """What must be equal for figures to compare: model, settings, device and versions.

    Raises:
        SystemExit: if vLLM does not work here.
    """
    record: dict[str, Any] = {"model": Path(model).name, "settings": dataclasses.asdict(settings), "group": GROUP}
    log = folder / "environment.log"
    problem = run_apart(environment, log=log, deadline=deadline, receive=record.__setitem__)
    if problem:
        sys.exit(f"vLLM does not work here: {problem}")
    console.print(f"on {record['environment']['device']}, vLLM {record['environment']['vllm']}", highlight=False)
    return json.loads(json.dumps(record))  # tuples become the lists that a file gives back


@app.command(help=__doc__)
def main(
    model: Annotated[str, typer.Argument(help=f"{', '.join(SHAPES)}, a config.json, or a checkpoint.")] = "",
    rows: Annotated[str, typer.Option(help="Rows, comma-separated; all by default.")] = "",
    parts: Annotated[str, typer.Option(help="Tools, comma-separated.")] = ",".join(PARTS),
    batches: Annotated[str, typer.Option(help="Batches of `bench latency`.")] = "1,8,64",
    concurrency: Annotated[str, typer.Option(help="Clients of `bench serve`.")] = "1,8,64,256",
    latency: Annotated[str, typer.Option(help="Tokens in and out of a request of `bench latency`.")] = "32,128",
    load: Annotated[str, typer.Option(help="The same of `bench throughput` and `bench serve`.")] = "512,128",
    prompts: Annotated[int, typer.Option(help="Requests of `bench throughput`.")] = 256,
    prefill: Annotated[int, typer.Option(help="Tokens in of a prefill.")] = 2048,
    runs: Annotated[int, typer.Option(help="How often each is measured.")] = 3,
    profile: Annotated[bool, typer.Option(help="Also break down a decode step of every batch.")] = False,
    minutes: Annotated[float, typer.Option(help="Stop after that long and say what is left out.")] = 8.5,
    resume: Annotated[bool, typer.Option(help="Keep what the JSON file holds, measure the rest.")] = False,
    engine: Annotated[str, typer.Option(help="More flags for every engine, as for `vllm serve`.")] = "",
    work: Annotated[Path, typer.Option(help="Folder for model configs, logs and traces.")] = Path("build/serving"),
    smoke: bool = False,
    as_json: Annotated[Path, typer.Option("--json")] = Path("benchmarks/results/serving.json"),
) -> None:
    """Measure, print the tables, write JSON and a plot beside it."""
    deadline = time.monotonic() + 60 * minutes
    model = model or ("smoke" if smoke else "llama2-7b")
    if smoke:
        batches, concurrency, latency, load, prompts, prefill = "2", "2", "8,2", "8,4", 4, 16
    config, checkpoint = read_config(model)
    known = ("fp16", *([CHECKPOINT] if checkpoint else []), *list(ROWS)[1:])
    chosen, chosen_parts = _chosen(rows or ",".join(known), known), _chosen(parts, PARTS)
    flags = engine_flags(smoke, shlex.split(engine), prefill + 1 if "prefill" in chosen_parts else LONGEST)
    settings = Settings(runs, _pair(latency), _pair(load), prompts, flags, prefill)
    offline_tasks: list[Task] = [("latency", n) for n in _numbers(batches) if "latency" in chosen_parts]
    offline_tasks += [("prefill", 1)] if "prefill" in chosen_parts else []
    offline_tasks += [("throughput", prompts)] if "throughput" in chosen_parts else []
    offline_tasks += [("profile", n) for n in _numbers(batches) if profile]
    online_tasks: list[Task] = [("serve", n) for n in _numbers(concurrency) if "serve" in chosen_parts]
    folder = work / (model if model in SHAPES else Path(model).resolve().name)
    tokenizer = write_tokenizer(folder / "tokenizer", config)

    _set_environment(smoke)
    record = _new_record(model, settings, folder, deadline)
    results: dict[str, dict] = {name: {} for name in chosen}
    commands = command()
    if resume and as_json.exists():
        kept = resumed(as_json, record)
        results = {name: {} for name in known if name in kept["rows"] or name in chosen} | kept["rows"]
        commands = f"{kept['command']}; {commands}"
    record |= {"command": commands, "rows": results, "left_out": {}}
    session = Session(config, checkpoint, settings, folder, tokenizer, deadline, record, as_json, console)
    session.measure(offline, offline_tasks, chosen)
    session.measure(online, online_tasks, chosen)
    shown = {name: row for name, row in results.items() if report.measured({name: row}, *PARTS, "profile")}
    finish(console, record, as_json, report.tables(shown, settings), lambda: report.plot(shown, settings))
    if session.broken:
        sys.exit(f"failed: {', '.join(session.broken)}")
