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
checked to be finite before anything is timed. `--smoke` asks little of a tiny shape, or of MODEL, on a CPU too,
where its times mean nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import json
import math
import multiprocessing
import os
import re
import runpy
import shlex
import signal
import socket
import statistics
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from bq_kernels.format import QuantConfig, RotationConfig
from rich.console import Console
from rich.table import Table

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
WARM_UP = 8  # steps before a profile begins, by when all prompts have been read; then as many are profiled
LOGGED = {
    "loading_gib": r"Model loading took ([\d.]+) GiB",
    "kv_gib": r"Available KV cache memory: ([\d.]+) GiB",
    "kv_tokens": r"KV cache size: ([\d,]+) tokens",
    "kernel": r"Using (\w+Kernel) for",
}
# what a kernel (GPU) or operator (CPU) belongs to: the first pattern that its name matches
CATEGORIES = {
    "rotation": r"rotate|hada",
    "attention": r"attention|attn|flash|fmha|cache|rotary",
    "GEMM": r"gemm|gemv|::mm|addmm|matmul|linear|nvjet|xmma|cutlass|cublas|split_?k|marlin|machete|humming|onednn"
    r"|_decode_kernel|_dequantize_kernel",
    "norms": r"norm|rsqrt",
}

app = typer.Typer(add_completion=False)
console = Console(width=180)

Task = tuple[str, int]  # what to measure: latency, throughput, profile or serve; and for how many requests


@dataclass(frozen=True)
class Settings:
    """What every row is asked alike.

    Attributes:
        runs: how often each is measured.
        latency: tokens in and out of a request of `bench latency`.
        load: tokens in and out of a request of `bench throughput` and `bench serve`.
        prompts: requests of `bench throughput`.
        flags: flags of all engines.
    """

    runs: int
    latency: tuple[int, int]
    load: tuple[int, int]
    prompts: int
    flags: tuple[str, ...]


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


class Weights:
    """Mixed into vLLM's workers (`--worker-extension-cls`)."""

    def prepare_weights(self) -> dict[str, float]:
        """Fill packed codes with random bits if the weights are dummies; returns what all tensors take, in GiB.

        Raises:
            ValueError: if a tensor holds NaN or infinity.
        """
        model, size = self.get_model(), 0
        dummy = self.vllm_config.load_config.load_format == "dummy"
        for name, tensor in chain(model.named_parameters(), model.named_buffers()):
            size += tensor.nbytes
            if tensor.is_floating_point():
                if not math.isfinite(tensor.data.sum(dtype=torch.float32)):  # isfinite() would need memory of its own
                    raise ValueError(f"{name} holds NaN or infinity")
            # by name: other integers are counters, locks and indices
            elif dummy and name.rpartition(".")[2] in ("qweight", "weight_packed", "weight"):
                limits = torch.iinfo(tensor.dtype)
                tensor.data.random_(limits.min, limits.max + 1)
        return {"weights_gib": size / 2**30}


def _parse(tool: Any, flags: tuple[str, ...], **more: object) -> Any:
    """Arguments of one of vLLM's tools, as its command line would give them."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    tool.add_cli_args(parser)
    named = [f"--{name.replace('_', '-')}={value}" for name, value in more.items() if value is not True]
    return parser.parse_args([*flags, *named, *(f"--{name}" for name, value in more.items() if value is True)])


def environment() -> Iterator[tuple[str, dict[str, str]]]:
    """The device and the versions of what is measured."""
    import vllm
    from vllm.platforms import current_platform

    found = {"device": "CPU" if current_platform.is_cpu() else current_platform.get_device_name()}
    for name in ("torch", "triton", "transformers", "compressed-tensors", "humming-kernels"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    yield "environment", found | {"vllm": vllm.__version__, "BQ_VLLM_BACKEND": os.environ.get("BQ_VLLM_BACKEND", "")}


def check_logits(llm: Any) -> None:
    """Refuse an engine that computes NaN: its speed means nothing.

    Raises:
        ValueError: if a log-probability is not finite.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=2, logprobs=1, ignore_eos=True, detokenize=False)
    for request in llm.generate([{"prompt_token_ids": [5, 6, 7]}] * 2, sampling, use_tqdm=False):
        values = [entry.logprob for step in request.outputs[0].logprobs for entry in step.values()]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"wrong result: log-probabilities {values}")


def offline(todo: list[Task], flags: tuple[str, ...], settings: Settings, folder: Path) -> Iterator[tuple[Any, Any]]:
    """Start one engine and yield (task, result): seconds of every run, or the breakdown of a decode step."""
    from vllm import LLM
    from vllm.benchmarks import latency, throughput
    from vllm.engine.arg_utils import EngineArgs

    traces, out = folder / "traces", folder / "tool.json"
    if any(kind == "profile" for kind, _ in todo):
        profiler = {
            "profiler": "torch",
            "torch_profiler_dir": str(traces.resolve()),
            "torch_profiler_with_stack": False,
        }
        flags += ("--profiler-config", json.dumps(profiler | {"delay_iterations": WARM_UP, "max_iterations": WARM_UP}))
    llm = LLM.from_engine_args(EngineArgs.from_cli_args(_parse(latency, flags)))
    LLM.from_engine_args = lambda *_: llm  # each tool would start its own
    yield "memory", llm.collective_rpc("prepare_weights")[0]
    check_logits(llm)
    for kind, count in todo:
        if kind == "throughput":
            lengths = dict(zip(("random_input_len", "random_output_len"), settings.load, strict=True))
            arguments = _parse(throughput, flags, **lengths, num_prompts=count, output_json=out)
            seconds = []
            for _ in range(settings.runs + 1):
                throughput.main(arguments)
                seconds.append(json.loads(out.read_text())["elapsed_time"])
            yield (kind, count), seconds[1:]  # the first run meets every shape for the first time
            continue
        lengths = dict(zip(("input_len", "output_len"), settings.latency, strict=True))
        iterations = {"num_iters_warmup": 1, "num_iters": settings.runs}
        if kind == "latency":
            latency.main(_parse(latency, flags, **lengths, **iterations, batch_size=count, output_json=out))
            yield (kind, count), json.loads(out.read_text())["latencies"]
        else:
            lengths["output_len"] = 4 * WARM_UP
            latency.main(_parse(latency, flags, **lengths, **iterations, batch_size=count, profile=True))
            newest = max(traces.glob("*.pt.trace.json.gz"), key=lambda path: path.stat().st_mtime)
            with gzip.open(newest) as file:
                yield (kind, count), breakdown(json.load(file)["traceEvents"])


def breakdown(events: list[dict]) -> dict[str, float]:
    """Microseconds of a mean decode step by category, and `gaps`, in which the device (on a CPU: torch) did nothing.

    Every instant counts once, for what started last of what is running: on a GPU a kernel or a copy, else an operator
    of torch, without those that it calls. A rotation inside a GEMM's prologue counts as GEMM: the row `no-rotation`
    says what it costs.

    Args:
        events: `traceEvents` of a trace that torch.profiler wrote.

    Raises:
        ValueError: if the trace holds no step.
    """
    steps = sum(e.get("cat") == "user_annotation" and "_generation_" in e["name"] for e in events)
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    used = device or [e for e in events if e.get("cat") == "cpu_op"]
    if not steps or not used:
        raise ValueError(f"the trace holds {steps} steps and {len(used)} operations")
    total = dict.fromkeys((*CATEGORIES, "other", "gaps"), 0.0)
    running: list[tuple[float, str]] = []  # end and category, the last to start last
    now = first = min(e["ts"] for e in used)
    last = max(e["ts"] + e["dur"] for e in used)
    for event in (*sorted(used, key=lambda e: (e["ts"], -e["dur"])), {"ts": last, "dur": 0, "name": ""}):
        while now < event["ts"]:
            end, category = running[-1] if running else (event["ts"], "gaps")
            if end <= now:
                running.pop()
                continue
            total[category] += min(end, event["ts"]) - now
            now = min(end, event["ts"])
        matching = (name for name, pattern in CATEGORIES.items() if re.search(pattern, event["name"], re.IGNORECASE))
        inside = [category for end, category in running[-1:] if end > now and not device]  # what a GEMM calls is GEMM
        running.append((now + event["dur"], next(matching, *inside or ["other"])))
    return {name: value / steps for name, value in (total | {"step": last - first}).items()}


def _api_server(flags: tuple[str, ...]) -> None:
    sys.argv = ["api_server", *flags]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


def online(todo: list[Task], flags: tuple[str, ...], settings: Settings, folder: Path) -> Iterator[tuple[Any, Any]]:
    """Start a server and yield (task, medians of every run) by the number of clients.

    Raises:
        RuntimeError: if the server ends or a request fails.
    """
    from vllm.benchmarks import serve

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    address = ("--host", "127.0.0.1", "--port", str(port), "--uvicorn-log-level", "warning")
    server = multiprocessing.get_context("fork").Process(target=_api_server, args=(flags + address,))
    server.start()
    while True:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health").close()
            break
        if not server.is_alive():
            raise RuntimeError("the server ended")
        time.sleep(0.2)
    headers = {"Content-Type": "application/json"}
    call = urllib.request.Request(f"{url}/collective_rpc", b'{"method": "prepare_weights"}', headers)
    with urllib.request.urlopen(call) as answer:
        yield "memory", json.load(answer)["results"][0]
    model, tokenizer = (flags[flags.index(name) + 1] for name in ("--model", "--tokenizer"))
    for kind, clients in todo:
        runs = []
        for _ in range(settings.runs):
            lengths = dict(zip(("random_input_len", "random_output_len"), settings.load, strict=True))
            count = {"max_concurrency": clients, "num_warmups": clients, "num_prompts": max(4, 2 * clients)}
            target = {"base_url": url, "model": model, "tokenizer": tokenizer, "dataset_name": "random"}
            result = serve.main(_parse(serve, ("--disable-tqdm",), **target, **lengths, **count))
            if result["failed"]:
                raise RuntimeError(f"{result['failed']} of {count['num_prompts']} requests failed")
            names = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "output_throughput")
            runs.append({name: result[name] for name in names})
        yield (kind, clients), runs


def _child(function: Callable, arguments: tuple, log: Path, writer: Connection) -> None:
    """Body of a process: sends what the generator yields, then how it ended; prints go to the log."""
    os.setsid()  # whoever ends this process ends its engine with it
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        for item in function(*arguments):
            writer.send(item)
        writer.send(("done", None))
    except BaseException as problem:  # a tool may also call sys.exit
        traceback.print_exc()
        writer.send(("failed", f"{type(problem).__name__}: {problem}"))


def run_apart(
    function: Callable, *arguments: object, log: Path, deadline: float, receive: Callable[[Any, Any], None]
) -> str | None:
    """Run a generator in a process of its own and hand over what it yields; returns why it did not end well."""
    context = multiprocessing.get_context("forkserver")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(function, arguments, log, writer))
    process.start()
    writer.close()
    reason = None
    try:
        while True:
            ready = wait([reader, process.sentinel], max(0.0, deadline - time.monotonic()))
            if not ready:
                reason = "out of time"
            elif reader not in ready:
                reason = cause(log, "the process ended")
            else:
                what, value = reader.recv()
                if what == "failed":
                    reason = cause(log, value)
                elif what != "done":
                    receive(what, value)
                    continue
            process.join(10 if reason is None else 0)
            return reason
    except EOFError:
        return cause(log, "the process ended")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()  # it may not lead its group yet
        process.join()


def cause(log: Path, message: str) -> str:
    """The last error in a log that says more than that an engine did not start, or the message that there is."""
    prefix = r"^\(\w[^)]*\) (?:[A-Z]+ [\d: -]+\[[^\]]*\] ?)?"
    lines = [re.sub(prefix, "", line).strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [i for i, line in enumerate(lines) if re.match(r"(?:\w+\.)*\w+(?:Error|Exception|Exit)\b: .", line)]
    errors = [i for i in errors if "See root cause above" not in lines[i]]
    text = " ".join(lines[errors[-1] : errors[-1] + 4]) if errors else message
    return f"{text[:300]} ({log})"


def logged(log: Path) -> dict[str, Any]:
    """What vLLM says of memory and kernels: GiB, tokens that the KV cache has room for, names."""
    text = log.read_text(errors="replace")
    found = {key: match[1] for key, pattern in LOGGED.items() if (match := re.search(pattern, text))}
    return {k: v if k == "kernel" else float(v.replace(",", "")) for k, v in found.items()}


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


def rate(row: dict, task: Task, settings: Settings) -> list[float]:
    """Generated tokens a second of every run of a latency or throughput task; empty if it was not measured."""
    kind, count = task
    tokens = count * (settings.latency if kind == "latency" else settings.load)[1]
    return [tokens / seconds for seconds in row.get(kind, {}).get(str(count), [])]


def _cell(values: list[float], base: list[float]) -> str:
    if not values:
        return ""
    median = statistics.median(values)
    ratio = f", {median / statistics.median(base):.2f}×" if base else ""
    return f"{median:,.0f} ±{(max(values) - min(values)) / 2 / median:.0%}{ratio}"


def measured(rows: dict[str, dict], *kinds: str) -> list[Task]:
    """Tasks of some kinds that a row has a result of."""
    return [(kind, n) for kind in kinds for n in sorted({int(n) for row in rows.values() for n in row.get(kind, {})})]


def print_tables(rows: dict[str, dict], settings: Settings) -> None:
    """Print speeds (tokens a second: median, half the range, ratio to fp16), serving figures and profiles."""
    base = rows.get("fp16", {})
    speeds = measured(rows, "latency", "throughput")
    titles = [f"batch {count}" if kind == "latency" else kind for kind, count in speeds]
    table = Table("row", "weights, GiB", "room for KV, tokens", *titles, title="tokens/s")
    for name, row in rows.items():
        cells = (_cell(rate(row, task, settings), rate(base, task, settings)) for task in speeds)
        # vLLM's CPU build keeps repacked weights where no parameter shows them, and says nothing of memory
        weights, room = row.get("loading_gib", row.get("weights_gib", math.nan)), row.get("kv_tokens", math.nan)
        table.add_row(name, f"{weights:.3f}", f"{room:,.0f}", *cells)
    console.print(table)
    for name, row in rows.items():
        if "kernel" in row:
            console.print(f"{name}: {row['kernel']}")

    columns = ("TTFT, ms", "TPOT, ms", "tokens/s")
    table = Table("clients", "row", *columns, title="serving: median ± half the range, × fp16")
    for kind, count in measured(rows, "serve"):
        for name, row in rows.items():
            mine, other = (r.get(kind, {}).get(str(count), []) for r in (row, base))
            keys = ("median_ttft_ms", "median_tpot_ms", "output_throughput")
            if mine:
                cells = (_cell([run[key] for run in mine], [run[key] for run in other]) for key in keys)
                table.add_row(str(count), name, *cells)
    if table.row_count:
        console.print(table)

    table = Table("batch", "row", *CATEGORIES, "other", "gaps", "step", title="a decode step, µs")
    for name, row in rows.items():
        for count, parts in row.get("profile", {}).items():
            cells = (f"{parts[key]:.0f} ({parts[key] / parts['step']:.0%})" for key in list(parts)[:-1])
            table.add_row(count, name, *cells, f"{parts['step']:.0f}")
    if table.row_count:
        console.print(table)


def plot(rows: dict[str, dict], settings: Settings, path: Path) -> None:
    """Speeds relative to fp16, and tokens a second against clients."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, lines) = plt.subplots(1, 2, figsize=(14, 5))
    speeds = measured({name: row for name, row in rows.items() if name == "fp16"}, "latency", "throughput")
    for i, (name, row) in enumerate(rows.items()):
        heights = []
        for task in speeds:
            values, base = (rate(r, task, settings) for r in (row, rows["fp16"]))
            heights.append(statistics.median(values) / statistics.median(base) if values else math.nan)
        bars.bar([j + i / (len(rows) + 1) for j in range(len(speeds))], heights, 1 / (len(rows) + 1), label=name)
        served = [(n, row["serve"][str(n)]) for _, n in measured({name: row}, "serve")]
        points = [(n, statistics.median(run["output_throughput"] for run in runs)) for n, runs in served]
        if points:
            lines.loglog(*zip(*points, strict=True), marker=".", label=name)
    titles = [f"batch {count}" if kind == "latency" else kind for kind, count in speeds]
    bars.set(ylabel="tokens/s, × fp16", xticks=range(len(titles)), xticklabels=titles)
    lines.set(xlabel="clients", ylabel="tokens/s")
    for axis in (bars, lines):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


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
    return [int(part) for part in text.split(",")]


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
        batches, concurrency, lengths, prompts = "2", "2", (8, 4), 4
        equal += ["--max-model-len", "64", "--max-num-seqs", "4", "--max-num-batched-tokens", "64", "--enforce-eager"]
        # on a CPU, what an engine of its own process imports and what the sampler compiles takes longer than the rest
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    else:
        lengths, prompts = (512, 128), 256
        equal += ["--max-model-len", "1024", "--max-num-seqs", "256"]
        equal += ["--cudagraph-capture-sizes", *map(str, GRAPHS)]
    latency = (8, 2) if smoke else (32, 128)
    settings = Settings(runs, latency, lengths, prompts, (*equal, *shlex.split(engine)))
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
    multiprocessing.get_context("forkserver").set_forkserver_preload(["__main__", "vllm", *tools])

    record: dict[str, Any] = {"model": Path(model).name, "settings": dataclasses.asdict(settings), "group": GROUP}
    problem = run_apart(
        environment,
        log=folder / "environment.log",
        deadline=deadline,
        receive=lambda key, value: record.update({key: value}),
    )
    if problem:
        sys.exit(f"vLLM does not work here: {problem}")
    if record["environment"]["device"] == "CPU" and not smoke:
        sys.exit("no GPU here; --smoke runs the script on a CPU, where its times mean nothing")
    record = json.loads(json.dumps(record))  # tuples become the lists that a file gives back
    command = " ".join(["python", *(Path(argument).name for argument in sys.argv)])
    results: dict[str, dict] = {name: {} for name in chosen}
    if resume and as_json.exists():
        kept = resumed(as_json, record)
        results = {name: {} for name in known if name in kept["rows"] or name in chosen} | kept["rows"]
        command = f"{kept['command']}; {command}"
    record |= {"command": command, "rows": results, "left_out": {}}

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
            flags += ("--tokenizer", str(tokenizer), "--worker-extension-cls", "serving.Weights", *settings.flags)

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
