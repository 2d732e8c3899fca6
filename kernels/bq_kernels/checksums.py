"""SHA-256 of a checkpoint's files and tensors: written at export, compared by `bq-inspect` and by every loader.

The file `SHA256SUMS` holds the files' sums in the form of `sha256sum`, so `sha256sum -c SHA256SUMS` checks it too. The
header of every safetensors file holds the sums of its tensors: a damaged file can then name the tensor.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .format import FormatError

SUMS = "SHA256SUMS"
TENSOR_SUMS = "bq_sha256"  # key in a safetensors file's __metadata__: a JSON table, SHA-256 by tensor name
VERIFY_VARIABLE = "BQ_VERIFY"
_VERIFIED = "_BQ_VERIFIED"  # for processes that this one starts: what it has compared already
_UNLISTED = {"README.md", SUMS}  # people edit the card where it is published
_NOT_LOADED = ("bq_report.json", "report/")
_LINE = re.compile(r"([0-9a-f]{64})  ([^\\\n]+)")
_ITEM_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16}
_ITEM_BITS |= {"U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64}
_CHUNK = 2**22  # bytes hashed at a time: they stay in the cache of a core
_MOST_THREADS = 16

REMEDY = f"download or copy it again; if it was changed on purpose, delete its line in {SUMS}"


def wanted() -> bool:
    """Whether loading shall compare checksums: yes, unless the environment says `BQ_VERIFY=0`."""
    return os.environ.get(VERIFY_VARIABLE, "1") != "0"


# ---- sums of files and tensors


def file_sha256(path: Path, start: int = 0, stop: int | None = None) -> str:
    """SHA-256 of a file's bytes from `start` to before `stop`, by default all of them."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    left = (path.stat().st_size if stop is None else stop) - start
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while left > 0 and (count := file.readinto(memoryview(buffer)[: min(left, _CHUNK)])):
            digest.update(memoryview(buffer)[:count])
            left -= count
    return digest.hexdigest()


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Header of a safetensors file, and the place where its data begins.

    Raises:
        FormatError: if the file is not a whole safetensors file, or cannot be read.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            begin = 8 + int.from_bytes(file.read(8), "little")
            if begin > size:
                raise ValueError("the header goes beyond the end")
            header = json.loads(file.read(begin - 8))
        expected = begin + _data_bytes(header)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}); {REMEDY}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise FormatError(f"{path}: not a whole safetensors file; download it again") from None
    if size != expected:
        raise FormatError(f"{path}: damaged, {size} bytes of {expected}; download it again")
    return header, begin


def _data_bytes(header: dict[str, Any]) -> int:
    """Bytes of a file's tensors, which lie one behind the other.

    Raises:
        ValueError, TypeError, KeyError, AttributeError: if the header is not one of safetensors.
    """
    metadata = header.get("__metadata__")
    for key, value in ({} if metadata is None else metadata).items():
        if not isinstance(value, str):
            raise TypeError(f"metadata {key} is not text")
    end = 0
    entries = (entry for name, entry in header.items() if name != "__metadata__")
    for entry in sorted(entries, key=lambda entry: entry["data_offsets"]):
        (start, stop), shape = entry["data_offsets"], entry["shape"]
        if not all(type(size) is int and size >= 0 for size in (start, stop, *shape)):
            raise TypeError("places and sizes are integers")
        if start != end or 8 * (stop - start) != math.prod(shape) * _ITEM_BITS[entry["dtype"]]:
            raise ValueError("the data of a tensor is not where it must be")
        end = stop
    return end


def recorded_tensors(header: dict[str, Any]) -> dict[str, str] | None:
    """Sums of tensors as a header records them; None where it records none.

    Raises:
        ValueError: if the table is damaged.
    """
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or TENSOR_SUMS not in metadata:
        return None
    table = json.loads(metadata[TENSOR_SUMS])
    if not isinstance(table, dict):
        raise ValueError(f"{TENSOR_SUMS} is not a table")
    return table


def differing_tensors(path: Path) -> list[str] | None:
    """Tensors of a safetensors file whose bytes differ from the sums in its header; None where it has no sums.

    Raises:
        FormatError: if the file, or its table of sums, is damaged.
    """
    header, begin = read_header(path)
    try:
        table = recorded_tensors(header)
    except (ValueError, TypeError, RecursionError):
        raise FormatError(f"{path}: its header is damaged; {REMEDY}") from None
    if table is None:
        return None
    entries = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    differing = sorted(set(table) ^ set(entries))
    for name in sorted(set(table) & set(entries)):
        start, stop = entries[name]
        if file_sha256(path, begin + start, begin + stop) != table[name]:
            differing.append(name)
    return differing


# ---- SHA256SUMS


def files_to_list(folder: Path) -> Iterator[str]:
    """Names, relative to the folder, of the files that belong into its `SHA256SUMS`, sorted; hidden ones do not."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not hidden and name.as_posix() not in _UNLISTED:
            yield name.as_posix()


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` of a finished checkpoint, whole or not at all.

    Raises:
        OSError: if a file cannot be read, or the list not be written.
    """
    temporary = folder / f".{SUMS}"
    with open(temporary, "w", encoding="utf-8", newline="\n") as file:
        for name in filter(re.compile(r"[^\\\n]+").fullmatch, files_to_list(folder)):
            file.write(f"{file_sha256(folder / name)}  {name}\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / SUMS)


def read_sums(folder: Path) -> dict[str, str] | None:
    """Sums by file name as `SHA256SUMS` lists them; None where there is no such file.

    Raises:
        FormatError: if a line of it is not one that `sha256sum` writes, or names a file outside the folder.
    """
    path = folder / SUMS
    if not path.is_file():
        return None
    try:
        lines = path.read_bytes().decode("utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError:
        raise FormatError(f"{path}: damaged, not text; download it again, or delete it") from None
    sums: dict[str, str] = {}
    for number, line in enumerate(filter(None, lines), 1):
        match = _LINE.fullmatch(line)
        name = PurePosixPath(match[2]) if match else None
        if name is None or name.is_absolute() or ".." in name.parts or match[2] in sums:
            raise FormatError(f"{path}: line {number} is damaged; download the file again, or delete it")
        sums[match[2]] = match[1]
    return sums


@dataclass(frozen=True)
class Comparison:
    """Files that equal their sums, and files of the folder that no sum covers; `listed` is false without a list."""

    listed: bool
    files: list[str]
    tensors: int
    uncovered: list[str]


def compare(folder: Path) -> Comparison:
    """Compare every file and every tensor of a checkpoint with its sum.

    Raises:
        FormatError: naming the first file that is damaged or missing, the tensor in it, and the remedy.
    """
    sums = read_sums(folder)
    if missing := sorted(name for name in sums or {} if not (folder / name).is_file()):
        raise FormatError(f"{folder / missing[0]}: missing, though {SUMS} lists it; {REMEDY}")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    _compare_all(folder, sums or {}, shards)
    tensors = sum(len(_recorded(folder / name)) for name in shards)
    uncovered = sorted(set(files_to_list(folder)) - set(sums or {}))
    return Comparison(sums is not None, sorted(sums or {}), tensors, uncovered)


def compare_for_loading(folder: Path) -> None:
    """Compare what loading reads with its sums, once per process and those that it starts; off by `BQ_VERIFY=0`.

    Files that are not there are left to the loader. A shard without a line in `SHA256SUMS`, as the Hub's client leaves
    it that fetches only weights and config, is compared with the sums in its own header.

    Raises:
        FormatError: naming the first file that is damaged, the tensor in it, and the remedy.
    """
    if not wanted() or not folder.is_dir():
        return
    try:
        sums = read_sums(folder) or {}
        loaded = {
            name: value
            for name, value in sums.items()
            if not name.startswith(_NOT_LOADED) and (folder / name).is_file()
        }
        shards = [path.name for path in folder.glob("*.safetensors") if path.name not in loaded]
        state = _state(folder, [*loaded, *shards])
        if os.environ.get(_VERIFIED) != state:
            _compare_all(folder, loaded, shards)
            os.environ[_VERIFIED] = state
    except FormatError as error:
        raise FormatError(f"{error} ({VERIFY_VARIABLE}=0 loads without this comparison)") from None


def _state(folder: Path, names: list[str]) -> str:
    """What the outcome of a comparison rests on, as far as it shows without reading the files."""
    stats = [(name, (folder / name).stat()) for name in (*sorted(names), SUMS) if (folder / name).exists()]
    known = [str(folder.resolve()), *((name, stat.st_size, stat.st_mtime_ns, stat.st_ino) for name, stat in stats)]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _compare_all(folder: Path, sums: dict[str, str], shards: list[str]) -> None:
    """Compare files with `sums`, and tensors of `shards` with the sums in their headers, in parallel."""

    def check_file(name: str) -> str | None:
        try:
            return None if file_sha256(folder / name) == sums[name] else _difference(folder / name)
        except OSError as error:
            return f"{folder / name}: cannot be read ({error.strerror}); {REMEDY}"

    def check_tensors(name: str) -> str | None:
        differing = differing_tensors(folder / name)
        return f"{folder / name}: tensor {differing[0]} differs from its SHA-256; {REMEDY}" if differing else None

    threads = min(_MOST_THREADS, os.cpu_count() or 1, len(sums) + len(shards) or 1)
    # the largest file first, so that none is left to one thread at the end
    by_size = sorted(sums, key=lambda name: -(folder / name).stat().st_size)
    with ThreadPoolExecutor(threads) as pool:
        files, tensors = pool.map(check_file, by_size), pool.map(check_tensors, sorted(shards))
        for problem in (*files, *tensors):
            if problem:
                raise FormatError(problem)


def _difference(path: Path) -> str:
    """The message about a file that differs from its sum: the tensor too, where that can be told."""
    tensors = differing_tensors(path) if path.suffix == ".safetensors" else None
    if tensors:
        return f"{path}: tensor {tensors[0]} differs from its SHA-256 ({len(tensors)} in all); {REMEDY}"
    where = "" if tensors is None else ", in its header or as a whole"
    return f"{path}: differs from its SHA-256 in {SUMS}{where}; {REMEDY}"


def _recorded(path: Path) -> dict[str, str]:
    return recorded_tensors(read_header(path)[0]) or {}
