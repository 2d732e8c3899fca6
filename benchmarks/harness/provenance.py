"""The origin of results, as every benchmark records it: command, versions, device, settings of an output folder."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import typer


def command() -> str:
    """The command of this process, with bare names in place of this machine's folders."""
    names = (",".join(Path(part).name for part in argument.split(",")) for argument in sys.argv)
    return shlex.join(["python", *names])


def versions(*packages: str) -> dict[str, str]:
    """Version by package; `not installed` where there is none."""
    found = {}
    for name in packages:
        try:
            found[name] = version_of(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def cpu() -> str:
    """Name of the CPU, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "unknown")


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Make a folder for measurements with these settings, or reuse it.

    Raises:
        typer.BadParameter: if the folder holds measurements with other settings.
    """
    file = folder / "settings.json"
    if file.exists() and (before := json.loads(file.read_text())) != settings:
        raise typer.BadParameter(f"{folder} holds measurements with {before}; choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings))
