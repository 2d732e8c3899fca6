"""Tensors of a folder of safetensors files, by name, read on demand."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from bq_kernels.format import FormatError
from bq_kernels.shards import INDEX, SINGLE, read_index
from safetensors import SafetensorError, safe_open

from .errors import UserError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # dtypes of weights that are not quantized
# weights in another layout, or of another model, that lie beside a model's own
_BESIDE = ("consolidated*", "adapter_model*", "training_args*", "optimizer*")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def _read_index(folder: Path) -> dict[str, str] | None:
    try:
        return read_index(folder)
    except FormatError as error:
        raise UserError(str(error)) from error


def model_files(folder: Path) -> list[Path]:
    """The safetensors files that make up a model: those of the index, else `model.safetensors`, else its shards.

    Raises:
        UserError: if there are none, or one of the index is missing.
    """
    if (listed := _read_index(folder)) is not None:
        for name in sorted(set(listed.values())):
            if not (folder / name).is_file():
                raise UserError(f"{folder / name}: missing, though {INDEX} lists it; download it again")
        return [folder / name for name in sorted(set(listed.values()))]
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    files = [f for f in sorted(folder.glob("*.safetensors")) if not any(f.match(pattern) for pattern in _BESIDE)]
    if not files:
        raise UserError(f"{folder}: no .safetensors file; convert the weights first (nothing is ever unpickled here)")
    return files


@dataclass(frozen=True)
class Slice:
    """A part of a stored tensor [count, …, columns]: of one entry some columns, the last two dimensions exchanged.

    Attributes:
        index: of the entry.
        columns: of it.
    """

    index: int
    columns: slice

    def of(self, entry: torch.Tensor) -> torch.Tensor:
        """The part of an entry that has been read: a matrix, or a vector."""
        part = entry[..., self.columns]
        return (part.T if part.dim() == 2 else part).contiguous()


class TensorStore:
    """Tensors of safetensors files.

    Args:
        folder: of the files, for messages.
        files: by default every safetensors file of the folder.

    Raises:
        UserError: from the constructor, if there are no safetensors files or one cannot be read.
    """

    def __init__(self, folder: Path, files: Iterable[Path] | None = None):
        self.folder = folder
        self.files = sorted(folder.glob("*.safetensors")) if files is None else list(files)
        if not self.files:
            raise UserError(f"{folder}: no .safetensors file")
        self._place: dict[str, tuple[Path, str]] = {}  # file, and name in it
        self._slices: dict[str, Slice] = {}
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as handle:
                    self._place |= {name: (file, name) for name in handle.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: cannot be read, truncated or damaged ({error}); get it again") from error
        for name, file in sorted((_read_index(folder) or {}).items()):
            if name not in self._place:
                raise UserError(f"{folder / file}: tensor {name} of the index is not there")

    @classmethod
    def of_model(cls, folder: Path) -> TensorStore:
        """The tensors of a model's folder, other files that lie beside its own left out.

        Raises:
            UserError: as the constructor, and if a file of the index is missing.
        """
        return cls(folder, model_files(folder))

    def rename(self, names: dict[str, str]) -> None:
        """Call tensors by other names from now on, and forget the rest.

        Args:
            names: new name by name in the files.
        """
        self._place = {new: self._place[old] for old, new in names.items()}
        self._slices = {names[old]: part for old, part in self._slices.items() if old in names}

    def split(self, name: str, parts: dict[str, Slice]) -> None:
        """Give parts of a tensor as tensors of their own from now on, in its place.

        Args:
            name: of the tensor.
            parts: by new name.
        """
        place = self._place.pop(name)
        self._place |= dict.fromkeys(parts, place)
        self._slices |= parts

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._place)

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            UserError: if it is missing.
        """
        file, stored = self._find(name)
        part = self._slices.get(name)
        with safe_open(file, framework="pt") as handle:
            return handle.get_tensor(stored) if part is None else part.of(handle.get_slice(stored)[part.index])

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading its data."""
        file, stored = self._find(name)
        with safe_open(file, framework="pt") as handle:
            shape = tuple(handle.get_slice(stored).get_shape())
        part = self._slices.get(name)
        return shape if part is None else tuple(part.of(torch.empty(shape[1:], device="meta")).shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading its data."""
        file, stored = self._find(name)
        with safe_open(file, framework="pt") as handle:
            return _DTYPES[handle.get_slice(stored).get_dtype()]

    def nbytes(self, name: str) -> int:
        """Size of a tensor's data, without reading it."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def _find(self, name: str) -> tuple[Path, str]:
        if name not in self._place:
            raise UserError(f"{self.folder}: tensor {name} is missing")
        return self._place[name]
