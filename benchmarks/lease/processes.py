"""Runs a command up to a limit and leaves no process behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

GRACE = 5.0  # seconds for a process to end by itself once it is asked to


def _parents() -> dict[int, int]:
    """Parent by process, of all processes of this machine."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            # pid (name) state parent …; a name may hold spaces and brackets
            found[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    return found


def descendants(pid: int) -> list[int]:
    """All processes below a process, in whatever session they are: engines of vLLM lead sessions of their own."""
    children: dict[int, list[int]] = {}
    for child, parent in _parents().items():
        children.setdefault(parent, []).append(child)
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _end(process: subprocess.Popen) -> None:
    """Interrupt a process, so that it can clean up, and kill what is left of it and of all below it."""
    below = descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    for pid in (*below, process.pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def run_limited(
    command: tuple[str, ...], seconds: float, log: Path, environment: dict[str, str], folder: Path
) -> int | None:
    """Run a command, everything that it prints into a log.

    Args:
        command: with its arguments.
        seconds: it is ended then, with all processes below it.
        log: file for its output.
        environment: its variables.
        folder: it runs there.

    Returns:
        its exit status; None if it was ended.

    Raises:
        KeyboardInterrupt: after the command has been ended.
    """
    deadline = time.monotonic() + seconds
    with log.open("w") as file:
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        # of its own session: a Ctrl-C of the terminal reaches only the caller, which then ends the command in order
        process = subprocess.Popen(command, env=environment, cwd=folder, start_new_session=True, **streams)
        try:
            return process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                _end(process)
