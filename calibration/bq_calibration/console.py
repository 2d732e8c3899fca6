"""Consoles, progress bars and the choice of a device, for the commands and the Python API."""

from __future__ import annotations

import os

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .errors import UserError

stdout, stderr = Console(), Console(stderr=True)


def is_first() -> bool:
    """Whether this is the first of the processes that torchrun has started, or alone: the one that is heard."""
    return int(os.environ.get("RANK", 0)) == 0


def make_progress(shown: bool) -> Progress:
    """Progress bars on stderr, the first process's, or ones that nobody sees."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=stderr, disable=not (shown and is_first()))


def check_device(device: str) -> str:
    """The device of that name, `auto` resolved.

    Raises:
        UserError: if this machine does not have it, or it does not compute.
    """
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()  # `meta` has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device}: not available here ({str(error).splitlines()[0]})") from error
    return device
