"""Writing files whole or not at all, with errors that name the file; and which files belong to a model."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from bq_kernels import checksums
from safetensors.torch import save_file

from .errors import UserError, explain_write

logger = logging.getLogger(__name__)

# weights in any form, and what trainers leave: neither is copied into a checkpoint nor, but for safetensors, downloaded
WEIGHTS = (
    *("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.npz", "*.h5", "*.msgpack", "*.ot", "*.distcp"),
    *("*.gguf", "*.ggml", "*.onnx", "*.onnx_data*", "*.tflite", "*.mlmodel", "*.mlpackage", "*.nemo", "*.pdparams"),
    *("*.engine", "*.llamafile", "*.zip", "*.tar", "*.gz", "*.zst", "*.7z"),
)
_NOT_CARRIED = (
    *WEIGHTS,
    *("*.safetensors", "*.index.json", ".*", "*.tmp"),
    # written anew: config.json, the card and what `bq-calibrate` adds; SHA256SUMS of the source would be wrong
    *("config.json", "README.md", "bq_report.json", checksums.SUMS),
    # of an adapter, another quantization, another layout, training: loaders would take them for the model's own
    *("adapter_config.json", "quant*_config.json", "hf_quant_config.json", "params.json", "trainer_state.json"),
    *("*.log", "events.out.*"),
)
_CARRIED_FOLDERS = ("additional_chat_templates",)  # the only ones that transformers reads
_MOST_BYTES = 256 * 2**20  # the largest tokenizers have some 35 MB


def carried_files(folder: Path) -> Iterator[Path]:
    """Files of a 16-bit model that its checkpoint carries over, relative to `folder`, sorted.

    All files are, but for weights and what belongs to another form of the model: tokenizer and processor in whatever
    files they have, chat templates, code that `auto_map` of config.json names, licences.
    """
    return (file.relative_to(folder) for file in _beside_weights(folder) if file.stat().st_size <= _MOST_BYTES)


def copy_carried(source: Path, folder: Path) -> None:
    """Copy a model's `carried_files` into a checkpoint's folder.

    Raises:
        WriteError: if one cannot be written.
    """
    with explain_write(folder):
        for name in carried_files(source):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)


def warn_of_large_files(folder: Path) -> None:
    """Log the files that a checkpoint does not carry over for their size alone."""
    for file in _beside_weights(folder):
        if file.stat().st_size > _MOST_BYTES:
            logger.warning("%s is not carried over: %.0f MB", file, file.stat().st_size / 1e6)


def _beside_weights(folder: Path) -> Iterator[Path]:
    found = [folder, *(folder / name for name in _CARRIED_FOLDERS)]
    for file in sorted(file for part in found if part.is_dir() for file in part.iterdir()):
        if file.is_file() and not any(fnmatch(file.name.lower(), pattern.lower()) for pattern in _NOT_CARRIED):
            yield file


def _commit(temporary: Path, path: Path) -> None:
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], record_sums: bool = False) -> None:
    """Write a safetensors file.

    Args:
        path: the file.
        tensors: by name.
        record_sums: whether its header shall hold the SHA-256 of each tensor.

    Raises:
        WriteError: if it cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    metadata = {"format": "pt"}
    if record_sums:
        sums = {name: hashlib.sha256(_bytes(tensor)).hexdigest() for name, tensor in sorted(tensors.items())}
        metadata[checksums.TENSOR_SUMS] = json.dumps(sums)
    with explain_write(path):
        save_file(dict(sorted(tensors.items())), temporary, metadata=metadata)
        if record_sums:
            _sort_metadata(temporary)
        _commit(temporary, path)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _sort_metadata(path: Path) -> None:
    """Put the entries of a header's metadata in order, in place: the library's order differs from run to run."""
    header, begin = checksums.read_header(path)
    ordered = header | {"__metadata__": dict(sorted(header["__metadata__"].items()))}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    with open(path, "r+b") as file:
        file.seek(8)
        file.write(text.ljust(begin - 8))


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """The table in a JSON file.

    Args:
        path: the file.
        missing: tells the user what to do where the file is not there.

    Raises:
        UserError: if it is missing or holds no JSON table.
    """
    if not path.is_file():
        raise UserError(f"{path.parent}: no {path.name}; {missing}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON table, found {type(data).__name__}")
    return data


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file.

    Raises:
        WriteError: if it cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    with explain_write(path):
        temporary.write_text(json.dumps(data, indent=2) + "\n")
        _commit(temporary, path)
