"""GGUF files: their metadata, and the block types whose codes the format can hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, dequantize

from ..errors import UserError, explain

_FLOATS = {0: np.float32, 1: np.float16}  # type ids that are read as they are
_BF16 = 30


@dataclass(frozen=True)
class BlockType:
    """A type whose blocks are `size` codes with one float16 number d, w = step·d·(code − zero).

    Attributes:
        name: as llama.cpp calls it.
        size: codes per block, which is a group.
        nbytes: bytes per block.
        bits: bits per code.
        zero: zero point.
        place: first byte of d.
        decode: uint8 [blocks, nbytes] to codes [blocks, size].
        step: factor of d.
    """

    name: str
    size: int
    nbytes: int
    bits: int
    zero: float
    place: int
    decode: Callable[[torch.Tensor], torch.Tensor]
    step: int = 1


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return torch.cat((blocks[:, 2:] & 15, blocks[:, 2:] >> 4), dim=1)  # low halves: elements 0 … 15


def _q2_0(blocks: torch.Tensor) -> torch.Tensor:
    return torch.stack([blocks[:, 2:] >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)


def _q1_0(blocks: torch.Tensor) -> torch.Tensor:
    # −d and d are the two middle ones of four mid-rise levels with step 2·d
    return torch.stack([blocks[:, 2:] >> shift & 1 for shift in range(8)], dim=2).flatten(1) + 1


def _tq2_0(blocks: torch.Tensor) -> torch.Tensor:
    runs = blocks[:, :64].unflatten(1, (2, 32))  # two runs of 32 bytes, each four planes of 32 codes
    return torch.stack([runs >> shift & 3 for shift in (0, 2, 4, 6)], dim=2).flatten(1)


def _base3(*runs: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Decoder of ternary digits in bytes: runs of bytes with five digits each, then one with four.

    Digit n of byte b is ⌊3·(b·3ⁿ mod 256) / 256⌋; a run of bytes holds its bytes' first digits, then the second, ….
    """

    def decode(blocks: torch.Tensor) -> torch.Tensor:
        codes, begin = [], 0
        for i, run in enumerate(runs):
            data = blocks[:, begin : begin + run].to(torch.int32)
            for n in range(4 if i == len(runs) - 1 else 5):
                codes.append((data * 3**n % 256 * 3 >> 8).to(torch.uint8))
            begin += run
        return torch.cat(codes, dim=1)

    return decode


# type id -> blocks; ids from 100 on are those of PrismML's llama.cpp
BLOCK_TYPES = {
    2: BlockType("Q4_0", 32, 18, 4, 8, 0, _q4_0),
    34: BlockType("TQ1_0", 256, 54, 2, 1, 52, _base3(32, 16, 4)),
    35: BlockType("TQ2_0", 256, 66, 2, 1, 64, _tq2_0),
    41: BlockType("Q1_0", 128, 18, 2, 1.5, 0, _q1_0, step=2),
    42: BlockType("Q2_0", 64, 18, 2, 1, 0, _q2_0),
    142: BlockType("PQ2_0", 128, 34, 2, 1, 0, _q2_0),
    143: BlockType("PTQ1_0", 128, 28, 2, 1, 26, _base3(16, 8, 2)),
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a GGUF file: type id, shape with rows first, and where its data begin and end."""

    type: int
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def type_name(self) -> str:
        """As llama.cpp calls it, or the number."""
        return _name(self.type)


class GgufFile(GGUFReader):
    """A GGUF file whose tensors may have types that the package `gguf` does not know.

    Attributes:
        infos: tensors by name.
        metadata_end: first byte behind the metadata.
    """

    def __init__(self, path: Path):
        self.path = path
        with explain(f"{path}: not a GGUF file that can be read, truncated or damaged; get it again"):
            super().__init__(path)

    def _build_tensor_info(self, offs: int, count: int):
        self.metadata_end = int(offs)
        return super()._build_tensor_info(offs, count)

    def _build_tensors(self, start_offs: int, fields: list) -> None:
        self.infos: dict[str, TensorInfo] = {}
        for field in fields:
            _, name, _, dims, type_id, offset = field.parts
            kind, begin = int(type_id[0]), int(start_offs + offset[0])
            size, nbytes = _block_of(self.path, field.name, kind)
            count = int(np.prod(dims))
            shape = tuple(int(dim) for dim in reversed(dims))
            self.infos[str(bytes(name), "utf-8")] = TensorInfo(kind, shape, begin, begin + count // size * nbytes)
        self._check_places()

    def _check_places(self) -> None:
        """Refuse a file whose tensors overlap or end behind it."""
        ordered = sorted(self.infos.items(), key=lambda item: item[1].begin)
        limits = [info.begin for _, info in ordered[1:]] + [len(self.data)]
        for (name, info), limit in zip(ordered, limits, strict=True):
            if info.end > limit:
                hint = "; an older Q2_0 of PrismML has groups of 128, take the PQ2_0 file" if info.type == 42 else ""
                short = f"{info.end - limit} bytes too few"
                raise UserError(f"{self.path}: tensor {name} ({info.type_name}) has {short}{hint}")

    def value(self, key: str) -> Any:
        """A text or number of the metadata; None where it is missing."""
        if (field := self.fields.get(key)) is None:
            return None
        part = field.parts[field.data[0]]
        return str(bytes(part), "utf-8") if part.dtype == np.uint8 and len(field.parts) > 4 else part[0].item()

    def raw(self, name: str) -> torch.Tensor:
        """The bytes of a tensor, uint8, copied."""
        info = self.infos[name]
        return torch.from_numpy(np.array(self.data[info.begin : info.end]))

    def codes(self, name: str) -> torch.Tensor:
        """Codes, uint8 [N, K], of a matrix whose type is one of BLOCK_TYPES."""
        block = BLOCK_TYPES[self.infos[name].type]
        return block.decode(self._blocks(name)).reshape(self.infos[name].shape)

    def scales(self, name: str) -> torch.Tensor:
        """Scales, float16 [N, K/group], of a matrix whose type is one of BLOCK_TYPES."""
        block = BLOCK_TYPES[self.infos[name].type]
        numbers = self._blocks(name)[:, block.place : block.place + 2].contiguous().view(torch.float16)
        return block.step * numbers.reshape(self.infos[name].shape[0], -1)

    def _blocks(self, name: str) -> torch.Tensor:
        return self.raw(name).unflatten(0, (-1, BLOCK_TYPES[self.infos[name].type].nbytes))

    def floats(self, name: str) -> torch.Tensor:
        """A tensor in the first of bfloat16, float16 and float32 that holds every value of it."""
        info = self.infos[name]
        if info.type == _BF16:
            return self.raw(name).view(torch.bfloat16).reshape(info.shape)
        if info.type in BLOCK_TYPES:
            scales = self.scales(name)
            groups = self.codes(name).unflatten(1, (scales.shape[1], -1)).float() - BLOCK_TYPES[info.type].zero
            values = (groups * scales.float().unsqueeze(-1)).flatten(1)
        elif info.type in _FLOATS:
            values = torch.from_numpy(self.raw(name).numpy().view(_FLOATS[info.type]).astype(np.float32))
        else:
            values = torch.from_numpy(dequantize(self.raw(name).numpy(), GGMLQuantizationType(info.type)))
        return _narrow(values.reshape(info.shape))

    def write_metadata(self, file: Path) -> None:
        """Write a GGUF file without tensors; transformers makes config and tokenizer of it, whatever the types are."""
        with open(self.path, "rb") as source, open(file, "wb") as target:
            target.write(source.read(8) + bytes(8))
            source.seek(16)
            shutil.copyfileobj(_Limited(source, self.metadata_end - 16), target)
            target.write(bytes(-self.metadata_end % 4096))


class _Limited:
    """The next bytes of an open file, to copy from."""

    def __init__(self, file, count: int):
        self.file, self.left = file, count

    def read(self, size: int) -> bytes:
        data = self.file.read(min(size, self.left))
        self.left -= len(data)
        return data


def _narrow(values: torch.Tensor) -> torch.Tensor:
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(values.to(dtype).float(), values):
            return values.to(dtype)
    return values


def _block_of(path: Path, tensor: str, kind: int) -> tuple[int, int]:
    """Values and bytes per block of a type."""
    if kind in BLOCK_TYPES:
        return BLOCK_TYPES[kind].size, BLOCK_TYPES[kind].nbytes
    try:
        return GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise UserError(f"{path}: tensor {tensor} has type {kind}, which is not known here") from None


def _name(kind: int) -> str:
    return BLOCK_TYPES[kind].name if kind in BLOCK_TYPES else GGMLQuantizationType(kind).name
