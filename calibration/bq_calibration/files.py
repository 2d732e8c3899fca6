"""Writing files whole or not at all, with errors that name the file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from .errors import explain_write


def _commit(temporary: Path, path: Path) -> None:
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        WriteError: if it cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    with explain_write(path):
        save_file(dict(sorted(tensors.items())), temporary, metadata={"format": "pt"})
        _commit(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file.

    Raises:
        WriteError: if it cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    with explain_write(path):
        temporary.write_text(json.dumps(data, indent=2) + "\n")
        _commit(temporary, path)
