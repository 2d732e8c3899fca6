"""Tokens per second of a running vLLM: ours beside fp16, QuaRot and what vLLM itself offers at 2 and 4 bits.

    python benchmarks/serving.py llama2-7b [--rows fp16,butterfly-128] [--parts latency,throughput,serve] [--profile]
    python benchmarks/serving.py llama2-7b --resume      measure what the last command left out

MODEL is a name below, any config.json (both with vLLM's dummy weights), or a checkpoint, which becomes a row beside
dummies of its shape. The rows:

    fp16               the unquantized model
    butterfly-128      ours, a learned rotation in blocks of 128 features, as wide as the groups of the 2-bit weights
    butterfly-full     ours, a rotation of the whole input
    no-rotation        the same kernels with no rotation at all: what is missing to it is what rotations cost
    hadamard-128, -full   QuaRot: Hadamard of the same width online, and the same kernels
    vllm-hadamard-w2   QuaRot as vLLM offers it: compressed-tensors, 2 bits, Hadamard in blocks of 128
    vllm-w4            what a user has today: compressed-tensors, 4 bits, the kernel that vLLM picks (it is printed)

The measuring tools are vLLM's own: `bench latency`, `bench throughput` and `bench serve`. Each of the first two would
start an engine, and an engine takes longer to start than to measure; so here they are called from Python, all on the
one engine of the row. `bench serve` then needs a server, a second start that finds everything compiled. vLLM is
imported once, in a process from which those of the rows are forked. All engines get the same flags.

Rows are measured in order of importance, first latency and throughput of all, then serving. What --minutes does not
suffice for, and every row that fails, is named with the reason. Dummy weights are finite floats; packed codes, which
vLLM leaves as they were allocated, are filled with random bits, since memory full of zeros costs less power. Logits are
checked to be finite before anything is timed. On a CPU vLLM runs our rows as dense 16-bit products, so there the table
says what a CPU serves, and nothing of the kernels. `--smoke` asks so little of a tiny shape, or of MODEL, that times
mean nothing at all.
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
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from bq_kernels.format import QuantConfig, RotationConfig
from provenance import command
from serving_engine import Settings, Task, environment, logged, offline, online, run_apart
from serving_tables import console, measured, plot, print_tables

# hidden, MLP, layers, heads, key/value heads, vocabulary, positions; `bench latency` wants 10,000 tokens or more
SHAPES = {
    "llama2-7b": (4096, 11008, 32, 32, 32, 32000, 4096),
    "llama2-13b": (5120, 13824, 40, 40, 40, 32000, 4096),
    "llama2-70b": (8192, 28672, 80, 64, 8, 32000, 4096),
    "llama3-8b": (4096, 14336, 32, 32, 8, 128256, 8192),
    "smoke": (128, 256, 1, 2, 1, 10240, 512),
}
GROUP = 128
GRAPHS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # captured batch sizes: fewer than vLLM's default, to start sooner
PARTS = ("latency", "throughput", "serve")

app = typer.Typer(add_completion=False)


def _ours(kind: str, wide: bool = False) -> Callable[[dict], dict]:
    def table(config: dict) -> dict:
        heads = config["num_attention_heads"]
        attention = heads * (config.get("head_dim") or config["hidden_size"] // heads)
        full = {"default": config["hidden_size"], "o_proj": attention, "down_proj": config["intermediate_size"]}
        rotation = RotationConfig(kind, full if wide else {"default": GROUP})
        return QuantConfig(2, GROUP, "midrise", rotation).to_dict()

    return table


def _compressed_tensors(bits: int, hadamard: bool = False) -> Callable[[dict], dict]:
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    online = {"targets": ["Linear"], "location": "input", "ignore": ["lm_head"]}
    transform = {"config_groups": {"R": {"type": "hadamard", "head_dim": GROUP, "apply": [online]}}}
    return lambda config: {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        **({"transform_config": transform} if hadamard else {}),
    }


# by importance: the quantization_config of a model's config
ROWS: dict[str, Callable[[dict], dict | None]] = {
    "fp16": lambda config: None,
    "butterfly-128": _ours("butterfly"),
    "hadamard-128": _ours("hadamard"),
    "vllm-w4": _compressed_tensors(4),
    "no-rotation": _ours("none"),
    "butterfly-full": _ours("butterfly", wide=True),
    "hadamard-full": _ours("hadamard", wide=True),
    "vllm-hadamard-w2": _compressed_tensors(2, hadamard=True),
}
OTHERS = ("fp16", "vllm-w4", "vllm-hadamard-w2")  # may fail where vLLM or the machine lacks something; ours may not


def read_config(model: str) -> tuple[dict, Path | None]:
    """config.json of the model, without quantization, and its folder if that holds weights.

    Raises:
        typer.BadParameter: if there is no such model, or its vocabulary is too small for the tools.
    """
    if model in SHAPES:
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        config = dict(zip((*names, "vocab_size", "max_position_embeddings"), SHAPES[model], strict=True))
        llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": False}
        return config | llama | {"dtype": "float16", "bos_token_id": 1, "eos_token_id": 2}, None
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    if not path.is_file():
        raise typer.BadParameter(f"{model}: neither one of {', '.join(SHAPES)} nor a config.json")
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)
    if config["vocab_size"] < 10000:
        raise typer.BadParameter(f"{model}: `bench latency` draws from 10,000 tokens, this vocabulary is smaller")
    return config, path.parent if list(path.parent.glob("*.safetensors")) else None


def write_tokenizer(folder: Path, config: dict) -> Path:
    """Write a tokenizer whose words are its tokens' numbers, so that prompts have exactly the length asked for."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config["vocab_size"])}, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (folder / "config.json").write_text(json.dumps(config))  # vLLM looks for it beside a tokenizer
    return folder


def resumed(path: Path, record: dict) -> dict:
    """The record of an earlier command, which the given one goes on with.

    Raises:
        SystemExit: if it was measured on another machine or with other settings.
    """
    kept = json.loads(path.read_text())
    if differing := [key for key in record if kept.get(key) != record[key]]:
        sys.exit(f"{path}: measured with another {', '.join(differing)}; figures would not compare")
    return kept


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
    equal = ["--dtype", "float16", "--no-enable-prefix-caching", "--seed", "0"]
    if smoke:
        batches, concurrency, latency, load, prompts = "2", "2", "8,2", "8,4", 4
        equal += ["--max-model-len", "64", "--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--enforce-eager"]
        # on a CPU, what an engine of its own process imports and what the sampler compiles takes longer than the rest
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    else:
        equal += ["--max-model-len", "1024", "--max-num-seqs", "256"]
        equal += ["--cudagraph-capture-sizes", *map(str, GRAPHS)]
    settings = Settings(runs, _pair(latency), _pair(load), prompts, (*equal, *shlex.split(engine)))
    config, checkpoint = read_config(model)
    known = ("fp16", *(["checkpoint"] if checkpoint else []), *list(ROWS)[1:])
    chosen, parts_chosen = _chosen(rows or ",".join(known), known), _chosen(parts, PARTS)
    folder = work / (model if model in SHAPES else Path(model).resolve().name)
    tokenizer = write_tokenizer(folder / "tokenizer", config)

    os.environ["HF_HUB_OFFLINE"] = "1"  # everything is in local folders
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # lets a server call its worker's extension
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_PLUGINS", "butterfly")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    tools = [f"vllm.benchmarks.{name}" for name in PARTS]
    multiprocessing.get_context("forkserver").set_forkserver_preload(["vllm", *tools])

    record: dict[str, Any] = {"model": Path(model).name, "settings": dataclasses.asdict(settings), "group": GROUP}
    problem = run_apart(
        environment,
        log=folder / "environment.log",
        deadline=deadline,
        receive=lambda key, value: record.update({key: value}),
    )
    if problem:
        sys.exit(f"vLLM does not work here: {problem}")
    console.print(f"on {record['environment']['device']}, vLLM {record['environment']['vllm']}", highlight=False)
    record = json.loads(json.dumps(record))  # tuples become the lists that a file gives back
    results: dict[str, dict] = {name: {} for name in chosen}
    commands = command()
    if resume and as_json.exists():
        kept = resumed(as_json, record)
        results = {name: {} for name in known if name in kept["rows"] or name in chosen} | kept["rows"]
        commands = f"{kept['command']}; {commands}"
    record |= {"command": commands, "rows": results, "left_out": {}}

    def save() -> None:
        as_json.parent.mkdir(parents=True, exist_ok=True)
        as_json.write_text(json.dumps(record, indent=1) + "\n")

    offline_tasks: list[Task] = [("latency", n) for n in _numbers(batches) if "latency" in parts_chosen]
    offline_tasks += [("throughput", prompts)] if "throughput" in parts_chosen else []
    offline_tasks += [("profile", n) for n in _numbers(batches) if profile]
    online_tasks: list[Task] = [("serve", n) for n in _numbers(concurrency) if "serve" in parts_chosen]
    broken, dead, slowest_start = [], set(), 0.0
    for function, tasks in ((offline, offline_tasks), (online, online_tasks)):
        for name in chosen:
            row = results[name]
            todo = [(kind, n) for kind, n in tasks if str(n) not in row.get(kind, {})]
            if not todo:
                continue
            if name in dead:
                record["left_out"][f"{name}, {function.__name__}"] = "its engine does not start"
                continue
            started = time.monotonic()
            if started + slowest_start > deadline:
                record["left_out"][f"{name}, {function.__name__}"] = "out of time"
                continue
            console.print(f"{name}: {', '.join(f'{kind} {n}' for kind, n in todo)}")
            place = folder / name
            place.mkdir(parents=True, exist_ok=True)
            if name == "checkpoint":
                flags = ("--model", str(checkpoint))
            else:
                table = ROWS[name](config)
                quantized = config | ({"quantization_config": table} if table else {})
                (place / "config.json").write_text(json.dumps(quantized, indent=1))
                flags = ("--model", str(place), "--load-format", "dummy")
            flags += (
                "--tokenizer",
                str(tokenizer),
                "--worker-extension-cls",
                "serving_engine.Weights",
                *settings.flags,
            )

            def receive(what: Any, value: Any, row: dict = row, started: float = started) -> None:
                nonlocal slowest_start
                if what == "memory":
                    slowest_start = max(slowest_start, time.monotonic() - started)
                    row.update(value)
                else:
                    kind, count = what
                    row.setdefault(kind, {})[str(count)] = value
                save()

            log = place / f"{function.__name__}.log"
            reason = run_apart(function, todo, flags, settings, place, log=log, deadline=deadline, receive=receive)
            row.update(logged(log))
            if reason:
                undone = [f"{kind} {n}" for kind, n in todo if str(n) not in row.get(kind, {})]
                record["left_out"][f"{name}, {', '.join(undone)}"] = reason
                broken += [name] if name not in OTHERS and reason != "out of time" else []
                dead |= set() if "weights_gib" in row else {name}
            save()
    save()
    shown = {name: row for name, row in results.items() if measured({name: row}, *PARTS, "profile")}
    print_tables(shown, settings)
    for what, why in record["left_out"].items():
        console.print(f"left out: {what}: {why}", markup=False)
    plot(shown, settings, as_json.with_suffix(".png"))
    if broken:
        sys.exit(f"failed: {', '.join(broken)}")


if __name__ == "__main__":
    app()
