"""Where results come from, as every benchmark writes it down: the command, the versions, the settings of a folder."""

from __future__ import annotations

import json
import shlex
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

import typer


def name_of(data: str) -> str:
    """A data set as results name it: of files, the last folder and the name; several by commas."""
    return ",".join("/".join(Path(part).parts[-2:]) for part in data.split(","))


def command() -> str:
    """The command that runs, with names in place of the folders of this machine."""
    names = (",".join(Path(part).name for part in argument.split(",")) for argument in sys.argv)
    return shlex.join(["python", *names])


def versions(*packages: str) -> dict[str, str]:
    """Version by package."""
    found = {}
    for name in packages:
        try:
            found[name] = version_of(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Make a folder for what is measured with these settings, or go on in it.

    Raises:
        BadParameter: if it holds what was measured with others.
    """
    kept = folder / "settings.json"
    if kept.exists() and (before := json.loads(kept.read_text())) != settings:
        raise typer.BadParameter(f"{folder} holds what was measured with {before}; choose another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(settings))
