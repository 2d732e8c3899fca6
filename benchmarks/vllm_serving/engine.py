"""vLLM's own measuring tools on one engine or server of a row; each generator runs in a process of its own."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import multiprocessing
import os
import runpy
import socket
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.provenance import versions
from benchmarks.vllm_serving.settings import Settings, Task
from benchmarks.vllm_serving.step_profile import breakdown

WARM_UP = 8  # steps before a profile begins, when all prompts have been read; then as many are profiled
SERVED = ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms", "output_throughput")


def _parse(tool: Any, flags: tuple[str, ...], **more: object) -> Any:
    """Arguments of one of vLLM's tools, as its command line would give them."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    tool.add_cli_args(parser)
    named = [f"--{name.replace('_', '-')}={value}" for name, value in more.items() if value is not True]
    return parser.parse_args([*flags, *named, *(f"--{name}" for name, value in more.items() if value is True)])


def environment() -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the device and the versions that a measurement depends on."""
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


def _lengths(names: tuple[str, str], tokens: tuple[int, int]) -> dict[str, int]:
    return dict(zip(names, tokens, strict=True))


def _throughput(flags: tuple[str, ...], settings: Settings, count: int, out: Path) -> list[float]:
    """Seconds of each run of `bench throughput`."""
    from vllm.benchmarks import throughput

    lengths = _lengths(("random_input_len", "random_output_len"), settings.load)
    arguments = _parse(throughput, flags, **lengths, num_prompts=count, output_json=out)
    seconds = []
    for _ in range(settings.runs + 1):
        throughput.main(arguments)
        seconds.append(json.loads(out.read_text())["elapsed_time"])
    return seconds[1:]  # the first run meets every shape for the first time


def _latency(flags: tuple[str, ...], settings: Settings, tokens: tuple[int, int], count: int, out: Path) -> list[float]:
    """Seconds of each run of `bench latency`, with so many tokens in and out."""
    from vllm.benchmarks import latency

    lengths = _lengths(("input_len", "output_len"), tokens)
    iterations = {"num_iters_warmup": 1, "num_iters": settings.runs}
    latency.main(_parse(latency, flags, **lengths, **iterations, batch_size=count, output_json=out))
    return json.loads(out.read_text())["latencies"]


def _profile(flags: tuple[str, ...], settings: Settings, count: int, traces: Path) -> dict[str, float]:
    """Breakdown of a decode step of `bench latency`."""
    from vllm.benchmarks import latency

    lengths = {"input_len": settings.latency[0], "output_len": 4 * WARM_UP}
    iterations = {"num_iters_warmup": 1, "num_iters": settings.runs}
    latency.main(_parse(latency, flags, **lengths, **iterations, batch_size=count, profile=True))
    newest = max(traces.glob("*.pt.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    with gzip.open(newest) as file:
        return breakdown(json.load(file)["traceEvents"])


def offline(todo: list[Task], flags: tuple[str, ...], settings: Settings, folder: Path) -> Iterator[tuple[Any, Any]]:
    """Start one engine and yield (task, result): seconds of every run, or the breakdown of a decode step."""
    from vllm import LLM
    from vllm.benchmarks import latency
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
            result = _throughput(flags, settings, count, out)
        elif kind in ("latency", "prefill"):
            tokens = settings.latency if kind == "latency" else (settings.prefill, 1)
            result = _latency(flags, settings, tokens, count, out)
        else:
            result = _profile(flags, settings, count, traces)
        yield (kind, count), result


def _api_server(flags: tuple[str, ...]) -> None:
    sys.argv = ["api_server", *flags]
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")


def _start_server(flags: tuple[str, ...]) -> str:
    """Start a server on a free port and wait until it answers; returns its address.

    Raises:
        RuntimeError: if the server ends.
    """
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
            return url
        if not server.is_alive():
            raise RuntimeError("the server ended")
        time.sleep(0.2)


def online(todo: list[Task], flags: tuple[str, ...], settings: Settings, folder: Path) -> Iterator[tuple[Any, Any]]:
    """Start a server and yield (task, medians of every run) by the number of clients.

    Raises:
        RuntimeError: if the server ends or a request fails.
    """
    from vllm.benchmarks import serve

    url = _start_server(flags)
    headers = {"Content-Type": "application/json"}
    call = urllib.request.Request(f"{url}/collective_rpc", b'{"method": "prepare_weights"}', headers)
    with urllib.request.urlopen(call) as answer:
        yield "memory", json.load(answer)["results"][0]
    model, tokenizer = (flags[flags.index(name) + 1] for name in ("--model", "--tokenizer"))
    for kind, clients in todo:
        runs = []
        for _ in range(settings.runs):
            lengths = _lengths(("random_input_len", "random_output_len"), settings.load)
            count = {"max_concurrency": clients, "num_warmups": clients, "num_prompts": max(4, 2 * clients)}
            target = {"base_url": url, "model": model, "tokenizer": tokenizer, "dataset_name": "random"}
            result = serve.main(_parse(serve, ("--disable-tqdm",), **target, **lengths, **count))
            if result["failed"]:
                raise RuntimeError(f"{result['failed']} of {count['num_prompts']} requests failed")
            runs.append({name: result[name] for name in SERVED})
        yield (kind, clients), runs
