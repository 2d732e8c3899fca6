"""The checkpoint format, version 1: keys and values of `quantization_config`, tensors of a layer.

This file is the only place that knows the schema. Calibration writes through it, every loader reads through it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # commands read the allowed values from here before they load torch
    import torch

FORMAT_VERSION = 1
QUANT_METHOD = "butterfly"
BITS = (2, 3, 4)
ZERO_POINTS = ("midrise", "float")
ROTATION_KINDS = ("butterfly", "hadamard", "none")
GROUP_MULTIPLE = 32  # 32 codes fill whole int32 words for 2, 3 and 4 bits alike
PER_CHANNEL = -1
ACTIVATION_BITS = (16, 8)  # 16: activations stay as they are
EMBEDDING, HEAD = "embed_tokens", "lm_head"  # last parts of their names
KEPT = "kept_tokens", "kept_rows"  # tensors of a packed embedding or LM head that hold rows in 16 bits
SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 65504.0  # positive float16


class FormatError(ValueError):
    """A checkpoint, config or tensor breaks the format; the message names it and the expected value."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype that a stored tensor must have, and limits of its values.

    Attributes:
        shape: of the tensor.
        dtype: of the tensor.
        positive: whether its values must be above zero.
        rows: its values must be numbers of so many rows, in ascending order; None where they need not.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    positive: bool = False
    rows: int | None = None

    def check(self, name: str, tensor: torch.Tensor) -> None:
        """Refuse `tensor` unless it has this shape and dtype and, if it holds floats, only finite and allowed ones.

        Raises:
            FormatError: naming the tensor and what was expected.
        """
        if tuple(tensor.shape) != self.shape or tensor.dtype != self.dtype:
            raise FormatError(
                f"{name}: expected {self.dtype} {list(self.shape)}, found {tensor.dtype} {list(tensor.shape)}"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise FormatError(f"{name}: holds NaN or infinity; the checkpoint is damaged, write or download it again")
        if self.positive and not bool((tensor > 0).all()):
            raise FormatError(
                f"{name}: holds zero or a negative number, scales are positive; write or download the checkpoint again"
            )
        if self.rows is not None:
            known = bool((tensor >= 0).all()) and bool((tensor < self.rows).all())
            if not known or not bool((tensor.diff() > 0).all()):
                raise FormatError(f"{name}: expected ascending numbers of {self.rows} rows")


def largest_code(bits: int) -> int:
    """Largest code of a `bits`-bit weight; codes are the integers 0 … largest_code(bits)."""
    return (1 << bits) - 1


def midrise_zero(bits: int) -> float:
    """Zero point of mid-rise levels, the middle of the codes: levels s·(q − z) are symmetric and never 0."""
    return largest_code(bits) / 2


def split_block(block_size: int) -> tuple[int, int]:
    """Write a block size as b = 2ᵏ·m with m odd; returns (k, m).

    Raises:
        FormatError: if `block_size` is not a positive integer.
    """
    if not isinstance(block_size, int) or isinstance(block_size, bool) or block_size < 1:
        raise FormatError(f"rotation block size must be a positive integer, not {block_size!r}")
    k = (block_size & -block_size).bit_length() - 1
    return k, block_size >> k


def num_angles(block_size: int) -> int:
    """Angles of one rotation block: k·b/2 of the butterfly layers, then m(m−1)/2 across the runs."""
    k, m = split_block(block_size)
    return k * block_size // 2 + m * (m - 1) // 2


def _reject_unknown_keys(what: str, data: dict[str, Any], allowed: set[str]) -> None:
    unknown = sorted(set(data) - allowed)
    if unknown:
        raise FormatError(
            f"{what}: unknown key {unknown[0]!r}; known are {sorted(allowed)}. "
            "The checkpoint may need a newer version of this software."
        )


@dataclass(frozen=True)
class RotationConfig:
    """Kind of rotation and its block size by module name (the last part of the name, or `default`)."""

    kind: str = "butterfly"
    block_size: dict[str, int] = field(default_factory=lambda: {"default": 64})

    def __post_init__(self) -> None:
        if self.kind not in ROTATION_KINDS:
            raise FormatError(f"rotation.kind: expected one of {list(ROTATION_KINDS)}, found {self.kind!r}")
        if self.kind == "none":
            return
        if not isinstance(self.block_size, dict) or "default" not in self.block_size:
            raise FormatError(f"rotation.block_size: expected a table with a 'default', found {self.block_size!r}")
        for size in self.block_size.values():
            split_block(size)

    def block(self, module: str) -> int:
        """Block size for a module, by the last part of its (dotted) name; 1 without rotation."""
        if self.kind == "none":
            return 1
        return self.block_size.get(module.rsplit(".", 1)[-1], self.block_size["default"])

    @classmethod
    def from_dict(cls, data: Any) -> RotationConfig:
        """Parse the `rotation` table, refusing unknown keys.

        Raises:
            FormatError: on an unknown key or value.
        """
        if not isinstance(data, dict):
            raise FormatError(f"rotation: expected a table, found {data!r}")
        _reject_unknown_keys("rotation", data, {"kind", "block_size"})
        if "kind" not in data:
            raise FormatError("rotation.kind is missing")
        if data["kind"] != "none" and "block_size" not in data:
            raise FormatError("rotation.block_size is missing")
        return cls(data["kind"], data.get("block_size", {}))

    def to_dict(self) -> dict[str, Any]:
        """The table as config.json holds it."""
        return {"kind": self.kind} | ({"block_size": dict(self.block_size)} if self.kind != "none" else {})


@dataclass(frozen=True)
class QuantConfig:
    """`quantization_config` of config.json (format version 1).

    Attributes:
        module_bits: modules, by full name, that have another number of bits than `bits`; absent where it is empty. The
            embedding and the LM head are packed only where it names them.
        kept_tokens: how many rows of a packed embedding or LM head, by full name, are stored in 16 bits as well, and
            read instead of the packed ones; absent where it is empty.
        prefill_activation_bits: bits of the rotated activations with the tokens of a prefill; absent where it is 16.

    Raises:
        FormatError: from the constructor, when a value is not one the format knows.
    """

    bits: int = 2
    group_size: int = 64
    zero_point: str = "midrise"
    rotation: RotationConfig = field(default_factory=RotationConfig)
    modules_to_not_convert: tuple[str, ...] = ("lm_head",)
    module_bits: dict[str, int] = field(default_factory=dict)
    kept_tokens: dict[str, int] = field(default_factory=dict)
    prefill_activation_bits: int = ACTIVATION_BITS[0]

    def __post_init__(self) -> None:
        if not isinstance(self.module_bits, dict):
            raise FormatError(f"module_bits: expected a table of names and bits, found {self.module_bits!r}")
        everywhere = {"bits": self.bits} | {f"module_bits.{name}": bits for name, bits in self.module_bits.items()}
        for name, bits in everywhere.items():
            if bits not in BITS or not isinstance(bits, int):  # 2.0 is in BITS
                raise FormatError(f"{name}: expected one of {list(BITS)}, found {bits!r}")
        if not isinstance(self.kept_tokens, dict):
            raise FormatError(f"kept_tokens: expected a table of names and numbers, found {self.kept_tokens!r}")
        for name, count in self.kept_tokens.items():
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise FormatError(f"kept_tokens.{name}: expected a positive integer, found {count!r}")
            if name.rpartition(".")[2] not in (EMBEDDING, HEAD) or name not in self.module_bits:
                raise FormatError(
                    f"kept_tokens: {name} is no packed embedding or LM head; module_bits names those that are packed"
                )
        if self.zero_point not in ZERO_POINTS:
            raise FormatError(f"zero_point: expected one of {list(ZERO_POINTS)}, found {self.zero_point!r}")
        bits = self.prefill_activation_bits
        if bits not in ACTIVATION_BITS or not isinstance(bits, int):
            raise FormatError(f"prefill_activation_bits: expected one of {list(ACTIVATION_BITS)}, found {bits!r}")
        size = self.group_size
        if not isinstance(size, int) or (size != PER_CHANNEL and (size < GROUP_MULTIPLE or size % GROUP_MULTIPLE)):
            raise FormatError(
                f"group_size: expected a multiple of {GROUP_MULTIPLE}, or {PER_CHANNEL} for one group a row, "
                f"found {size!r}"
            )

    @classmethod
    def from_dict(cls, data: Any) -> QuantConfig:
        """Parse `quantization_config`, refusing keys and values that version 1 does not allow.

        Raises:
            FormatError: naming the key, what was found and what was expected.
        """
        if not isinstance(data, dict):
            raise FormatError(f"quantization_config: expected a table, found {data!r}")
        names = {f.name for f in dataclasses.fields(cls)}
        _reject_unknown_keys("quantization_config", data, names | {"quant_method", "format_version"})
        if data.get("quant_method") != QUANT_METHOD:
            raise FormatError(f"quant_method: expected {QUANT_METHOD!r}, found {data.get('quant_method')!r}")
        if data.get("format_version") != FORMAT_VERSION or data["format_version"] is True:  # which equals 1
            raise FormatError(
                f"format_version: this software reads version {FORMAT_VERSION}, "
                f"the checkpoint says {data.get('format_version')!r}"
            )
        for name in ("bits", "group_size", "zero_point", "rotation"):
            if name not in data:
                raise FormatError(f"quantization_config.{name} is missing")
        skip = data.get("modules_to_not_convert", [])
        if not isinstance(skip, (list, tuple)) or not all(isinstance(s, str) for s in skip):
            raise FormatError(f"modules_to_not_convert: expected a list of names, found {skip!r}")
        return cls(
            bits=data["bits"],
            group_size=data["group_size"],
            zero_point=data["zero_point"],
            rotation=RotationConfig.from_dict(data["rotation"]),
            modules_to_not_convert=tuple(skip),
            module_bits=data.get("module_bits", {}),
            kept_tokens=data.get("kept_tokens", {}),
            prefill_activation_bits=data.get("prefill_activation_bits", ACTIVATION_BITS[0]),
        )

    def to_dict(self) -> dict[str, Any]:
        """The table as config.json holds it."""
        table = {
            "quant_method": QUANT_METHOD,
            "format_version": FORMAT_VERSION,
            "bits": self.bits,
            "group_size": self.group_size,
            "zero_point": self.zero_point,
            "rotation": self.rotation.to_dict(),
            "modules_to_not_convert": list(self.modules_to_not_convert),
        }
        if self.module_bits:
            table["module_bits"] = dict(self.module_bits)
        if self.kept_tokens:
            table["kept_tokens"] = dict(self.kept_tokens)
        if self.prefill_activation_bits != ACTIVATION_BITS[0]:
            table["prefill_activation_bits"] = self.prefill_activation_bits
        return table

    def skips(self, module: str) -> bool:
        """Whether `modules_to_not_convert` holds the module, one that contains it, or a part of its dotted name."""
        return any(f".{name}." in f".{module}." for name in self.modules_to_not_convert)

    def bits_of(self, module: str) -> int:
        """Bits of a code in a module, by its full name."""
        return self.module_bits.get(module, self.bits)

    def packs(self, module: str) -> bool:
        """Whether the embedding or the LM head of that full name is packed: where `module_bits` names it."""
        return module in self.module_bits and not self.skips(module)

    def group(self, in_features: int) -> int:
        """Columns that share a scale in a layer with `in_features` inputs."""
        return in_features if self.group_size == PER_CHANNEL else self.group_size

    def tensors(self, module: str, in_features: int, out_features: int) -> dict[str, TensorSpec]:
        """The tensors that a quantized linear layer stores, by suffix; of an embedding or LM head too.

        Args:
            module: full name of the layer; it selects the bits, its last part the rotation block size.
            in_features: K, columns of the weight; features of an embedding.
            out_features: N, rows of the weight; tokens of an embedding.

        Raises:
            FormatError: if the group or the rotation block does not divide K.
        """
        import torch

        group = self.group(in_features)
        if in_features % group or in_features % GROUP_MULTIPLE:
            raise FormatError(
                f"{module}: {in_features} input features cannot be cut into groups of {group} "
                f"(multiples of {GROUP_MULTIPLE}); choose a group size that divides {in_features}"
            )
        groups = (out_features, in_features // group)
        specs = {
            "qweight": TensorSpec((out_features, in_features * self.bits_of(module) // 32), torch.int32),
            "scales": TensorSpec(groups, torch.float16, positive=True),
        }
        if self.zero_point == "float":
            specs["zeros"] = TensorSpec(groups, torch.float16)
        block = self.rotation.block(module)
        if in_features % block:
            raise FormatError(f"{module}: rotation block size {block} does not divide its {in_features} input features")
        if self.rotation.kind == "butterfly":
            specs["angles"] = TensorSpec((in_features // block, num_angles(block)), torch.float16)
        if kept := self.kept_tokens.get(module):
            tokens, rows = KEPT
            specs[tokens] = TensorSpec((kept,), torch.int32, rows=out_features)
            specs[rows] = TensorSpec((kept, in_features), torch.float16)
        return specs
