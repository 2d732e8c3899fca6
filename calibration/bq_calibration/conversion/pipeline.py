"""A conversion: a checkpoint of another package, checked, then written in the format layer by layer."""

from __future__ import annotations

import platform
import resource
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bq_kernels.format import PER_CHANNEL, FormatError, QuantConfig, RotationConfig
from rich.progress import Progress

from ..checkpoint import REPORT, verify
from ..compute import dtype_name
from ..errors import UserError, explain_write
from ..export import GUARD, write_checksums, write_shards
from ..files import write_json
from ..model_card import write_converted_card
from ..store import TensorStore
from ..workspace import Workspace
from .detect import open_source
from .layer import exact_levels, pack_rows
from .source import Source


class Conversion:
    """One run of `bq-convert`.

    Args:
        source: folder, hub name or GGUF file.
        out: folder to write; unfinished work is kept in `OUT.partial` beside it.
        method: see `detect.open_source`.
        resume: go on from an earlier, interrupted run.

    Raises:
        UserError: when the source or the output folder will not do.
    """

    def __init__(self, source: str, out: str, method: str | None = None, resume: bool = False):
        self.workspace = Workspace(Path(out), resume)
        self.source = open_source(source, method)

    def run(self, progress: Progress) -> dict[str, Any]:
        """Check that every layer is held exactly, then write the checkpoint; returns its report.

        Raises:
            UserError: naming the layer that the format cannot hold.
        """
        self.source.check_fused()
        config = check_exact(self.source, progress)
        source, work = self.source, self.workspace
        sizes = {name: source.nbytes(name) for name in source.kept} | packed_sizes(source, config)
        settings = {
            "source": str(source.folder.resolve()),
            "method": source.method,
            "files": _fingerprint(source.folder),
        }
        with work.opened(settings, sum(sizes.values())):
            final = work.path / "final"
            with explain_write(final):
                final.mkdir(exist_ok=True)
            source.write_files(final)
            writer = _Writer(source, config)
            task = progress.add_task("converting", total=len(sizes))

            def read(name: str) -> torch.Tensor:
                progress.advance(task)
                return writer.tensor(name)

            write_shards(sizes, read, final)
            write_json(final / "config.json", exported_config(source, config, TensorStore(final)))
            report = self._report(final, config)
            write_json(final / REPORT, report)
            write_converted_card(final, source, config, report)
            write_checksums(final)
            work.publish(final)
        work.remove()
        return report

    def _report(self, folder: Path, config: QuantConfig) -> dict[str, Any]:
        written = TensorStore(folder)
        dtypes = {dtype_name(written.dtype(name)) for name in self.source.kept}
        verified = verify(folder, dtypes)
        return {
            "format_version": 1,
            "source_model": self.source.name,
            "quantization_config": config.to_dict(),
            "conversion": {"method": self.source.method, "source_quantization": self.source.quantization},
            "totals": {
                "bits_per_weight": verified.bits_per_weight(),
                "file_bits_per_weight": verified.file_bits_per_weight(),
                "stored_bits": verified.stored_bits,
                "quantized_weights": sum(n * k for n, k in verified.layers.values()),
                "checkpoint_bytes": verified.total_bytes,
                "source_bytes": self.source.stored_bytes,
            },
            "unquantized_dtypes": verified.unquantized_dtypes,
            "run": {
                "wall_seconds": round(self.workspace.elapsed(), 1),
                "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                "python": platform.python_version(),
                "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
            },
        }


def check_exact(source: Source, progress: Progress) -> QuantConfig:
    """Read the scales and zero points of every layer, and find the format that holds them.

    Raises:
        UserError: naming the first layer that the format cannot hold.
    """
    bits, groups, midrise = {}, {}, True
    for name in progress.track(source.layers, description="checking"):
        bits[name] = source.bits(name)
        exact = exact_levels(name, source.levels(name), bits[name])
        groups[name] = exact.scales.shape[1]
        midrise = midrise and exact.is_midrise(bits[name])
    most = Counter(bits.values()).most_common(1)[0][0]
    unquantized = sorted(set(source.model_layers()) - set(source.layers))
    try:
        config = QuantConfig(
            bits=most,
            group_size=_group_size(source, groups),
            zero_point="midrise" if midrise else "float",
            rotation=RotationConfig("none", {}),
            modules_to_not_convert=("lm_head", *source.routers(), *unquantized),
            module_bits={name: found for name, found in bits.items() if found != most},
        )
        for name, (rows, columns) in source.layers.items():
            config.tensors(name, columns, rows)
    except FormatError as error:
        raise UserError(f"{source.folder}: {error}") from error
    return config


def _group_size(source: Source, groups: dict[str, int]) -> int:
    sizes = {name: source.layers[name][1] // count for name, count in groups.items()}
    if len(set(sizes.values())) == 1:
        return next(iter(sizes.values()))
    if set(groups.values()) == {1}:
        return PER_CHANNEL
    (first, one), *others = sizes.items()
    other = next((name, size) for name, size in others if size != one)
    raise UserError(
        f"{first} has groups of {one} columns, {other[0]} of {other[1]}; the format has one group size for all layers"
    )


def packed_sizes(source: Source, config: QuantConfig) -> dict[str, int]:
    """Bytes of every tensor of the packed layers, by name."""
    return {
        f"{name}.{suffix}": torch.Size(spec.shape).numel() * spec.dtype.itemsize
        for name, (rows, columns) in source.layers.items()
        for suffix, spec in config.tensors(name, columns, rows).items()
    }


class _Writer:
    """Gives the checkpoint's tensors by name."""

    def __init__(self, source: Source, config: QuantConfig):
        self.source, self.config = source, config

    def tensor(self, name: str) -> torch.Tensor:
        layer, _, suffix = name.rpartition(".")
        if layer not in self.source.layers or suffix == "bias":
            return self.source.tensor(name)
        bits = self.config.bits_of(layer)
        exact = exact_levels(layer, self.source.levels(layer), bits)
        if suffix == "qweight":
            return pack_rows(exact.codes(self.source.codes(layer), bits), bits)
        return {"scales": exact.scales, "zeros": exact.zeros}[suffix].contiguous()


def exported_config(source: Source, config: QuantConfig, written: TensorStore) -> dict[str, Any]:
    """config.json of the checkpoint; its dtype is the source's, else that of the first unquantized matrix."""
    exported = source.config_dict | {"quantization_config": config.to_dict(), "transformers_weights": GUARD}
    if not {"dtype", "torch_dtype"} & set(source.config_dict):
        matrix = next(name for name in source.kept if len(written.shape(name)) == 2)
        exported["dtype"] = dtype_name(written.dtype(matrix))
    return exported


def _fingerprint(folder: Path) -> dict[str, list[int]]:
    """Size and time of every file of a source, to tell whether it is the same at a resumed run."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
