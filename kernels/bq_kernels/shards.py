"""Which safetensors files hold the tensors of a checkpoint; every loader asks here before it reads them.

Where a folder holds more, loaders differ: transformers takes `model.safetensors` before an index, vLLM the index, and
without one every file. So a checkpoint must leave no choice.
"""

from __future__ import annotations

import json
from pathlib import Path

from .checksums import read_header
from .format import FormatError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def tensor_files(folder: Path) -> dict[str, Path]:
    """The file of every tensor of a checkpoint, by name: all in `model.safetensors`, or as the index says.

    Raises:
        FormatError: naming a file that is missing, surplus or damaged, or a tensor that is in two files or in another
            one than the index says.
    """
    index, present = _read_index(folder / INDEX), sorted(folder.glob("*.safetensors"))
    if index is not None and not isinstance(index.get("metadata"), dict):  # transformers writes into it
        raise FormatError(f"{folder / INDEX}: not a valid index; download it again")
    listed = None if index is None else index["weight_map"]
    names = {SINGLE} if listed is None else set(listed.values())
    if missing := sorted(names - {file.name for file in present if file.is_file()}):
        says = "expected the tensors of the checkpoint" if listed is None else f"though {INDEX} lists it"
        raise FormatError(f"{folder / missing[0]}: missing, {says}; download it again")
    if SINGLE in names and len(names) > 1:
        raise FormatError(f"{folder / INDEX}: lists {SINGLE} and others; loaders would read that one alone")
    if surplus := [file for file in present if file.name not in names]:
        raise FormatError(f"{surplus[0]}: belongs to no checkpoint of {', '.join(sorted(names)[:3])}; remove it")
    found: dict[str, Path] = {}
    for file in present:
        for tensor in read_header(file)[0].keys() - {"__metadata__"}:
            if tensor in found:
                raise FormatError(f"{file}: tensor {tensor} is in {found[tensor].name} too; download both again")
            found[tensor] = file
    for tensor in sorted(found.keys() | listed.keys()) if listed is not None else ():
        if tensor not in found:
            raise FormatError(f"{folder / listed[tensor]}: tensor {tensor} of the index is not there")
        if found[tensor].name != listed.get(tensor):
            raise FormatError(f"{found[tensor]}: tensor {tensor} is not there by {INDEX}; download both again")
    return found


def read_index(folder: Path) -> dict[str, str] | None:
    """The file name of every tensor as a folder's index says; None where there is no index.

    Raises:
        FormatError: if the index is not valid.
    """
    data = _read_index(folder / INDEX)
    return None if data is None else data["weight_map"]


def _read_index(file: Path) -> dict | None:
    """An index as it is stored, its table of files checked."""
    if not file.is_file():
        return None
    try:
        data = json.loads(file.read_bytes())
        listed = data["weight_map"]
        if not listed or not all(isinstance(name, str) and Path(name).name == name for name in listed.values()):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise FormatError(f"{file}: not a valid index; download it again") from None
    return data
