"""Runs a generator in a process of its own, and finds in its log why it failed and what vLLM said."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

OUT_OF_TIME = "out of time"
_SAID_BY_VLLM = {
    "loading_gib": r"Model loading took ([\d.]+) GiB",
    "kv_gib": r"Available KV cache memory: ([\d.]+) GiB",
    "kv_tokens": r"KV cache size: ([\d,]+) tokens",
    "kernel": r"Using (\w+Kernel) for",
}


def _child(function: Callable, arguments: tuple, variables: dict[str, str], log: Path, writer: Connection) -> None:
    """Body of a process: sends what the generator yields, then how it ended; prints go to the log."""
    os.environ.update(variables)
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
    function: Callable,
    *arguments: object,
    log: Path,
    deadline: float,
    receive: Callable[[Any, Any], None],
    variables: dict[str, str] | None = None,
) -> str | None:
    """Run a generator of pairs in a process of its own.

    Args:
        function: makes the generator; with its arguments it must be picklable.
        arguments: of `function`.
        log: file for everything that the process prints.
        deadline: by time.monotonic(); the process is ended then.
        receive: called with each pair.
        variables: of its environment, besides those of this process.

    Returns:
        why it did not end well, or None.
    """
    context = multiprocessing.get_context("forkserver")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(function, arguments, variables or {}, log, writer))
    process.start()
    writer.close()
    reason = None
    try:
        while True:
            ready = wait([reader, process.sentinel], max(0.0, deadline - time.monotonic()))
            if not ready:
                reason = OUT_OF_TIME
            elif reader not in ready:
                reason = cause(log, "the process ended")
            else:
                kind, value = reader.recv()
                if kind == "failed":
                    reason = cause(log, value)
                elif kind != "done":
                    receive(kind, value)
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
    """The last error in a log that says more than that an engine did not start, or the given message."""
    prefix = r"^\(\w[^)]*\) (?:[A-Z]+ [\d: -]+\[[^\]]*\] ?)?"
    lines = [re.sub(prefix, "", line).strip() for line in log.read_text(errors="replace").splitlines()]
    errors = [i for i, line in enumerate(lines) if re.match(r"(?:\w+\.)*\w+(?:Error|Exception|Exit)\b: .", line)]
    errors = [i for i in errors if "See root cause above" not in lines[i]]
    text = " ".join(lines[errors[-1] : errors[-1] + 4]) if errors else message
    return f"{text[:300]} ({log})"


def logged_facts(log: Path) -> dict[str, Any]:
    """What vLLM says of memory and kernels: GiB, tokens that the KV cache has room for, names."""
    text = log.read_text(errors="replace")
    found = {key: match[1] for key, pattern in _SAID_BY_VLLM.items() if (match := re.search(pattern, text))}
    return {key: value if key == "kernel" else float(value.replace(",", "")) for key, value in found.items()}
