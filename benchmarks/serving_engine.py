"""vLLM's own measuring tools on one engine or server of a row, each in a process of its own."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import multiprocessing
import os
import re
import runpy
import signal
import socket
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from provenance import versions

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


class Weights:
    """Mixed into vLLM's workers (`--worker-extension-cls`)."""

    def prepare_weights(self) -> dict[str, float | None]:
        """Fill packed codes with random bits if the weights are dummies; returns what all tensors take, in GiB.

        That is None where vLLM keeps weights elsewhere and leaves empty tensors, as its CPU build does.

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
        moved = any(not parameter.numel() for parameter in model.parameters())
        return {"weights_gib": None if moved else size / 2**30}


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

    device = "CPU" if current_platform.is_cpu() else current_platform.get_device_name()
    found = versions("torch", "triton", "transformers", "compressed-tensors", "humming-kernels")
    found |= {"vllm": vllm.__version__, "BQ_VLLM_BACKEND": os.environ.get("BQ_VLLM_BACKEND", "")}
    yield "environment", {"device": device} | found


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
