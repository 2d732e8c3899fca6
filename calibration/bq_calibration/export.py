"""Assembling a butterfly checkpoint: packed tensors from the run, everything else from the 16-bit model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bq_kernels import checksums
from bq_kernels.format import HEAD, QuantConfig
from bq_kernels.shards import INDEX, SINGLE

from .errors import explain_write
from .files import copy_carried, write_json, write_tensors
from .model import SourceModel
from .store import TensorStore

SHARD_BYTES = 2 * 10**9
# Stands in config.json under transformers_weights, where transformers expects the name of a weights file and refuses
# this one with an error that repeats it: else it would warn of an unknown format, and make the packed layers up.
# `bq_calibration.hf` takes it out.
GUARD = "packed weights need `import bq_calibration.hf` (of bq-vllm) before from_pretrained"


def export(source: SourceModel, packed: TensorStore, config: QuantConfig, folder: Path) -> None:
    """Write config.json, weights, and the files that come along (tokenizer, licence, …) of a checkpoint.

    Args:
        source: the 16-bit model.
        packed: tensors of the packed layers, embedding and LM head; and of trained norms.
        config: goes into config.json.
        folder: written anew.

    Raises:
        WriteError: if a file cannot be written.
    """
    with explain_write(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    copy_carried(source.folder, folder)
    replaced = {f"{name.removesuffix('.qweight')}.weight" for name in packed.names() if name.endswith(".qweight")}
    if len(source.embedding_names) == 1 and config.packs(source.embedding_names[0]):
        replaced.add(f"{HEAD}.weight")  # a copy beside the embedding that it is tied to
    store_of = {name: source.store for name in source.store.names() if name not in replaced}
    store_of |= dict.fromkeys(packed.names(), packed)

    def read(name: str) -> torch.Tensor:
        tensor = store_of[name].get(name)
        return tensor.to(source.kept_dtype(name)) if name in source.store else tensor

    write_shards({name: store.nbytes(name) for name, store in store_of.items()}, read, folder)
    write_json(folder / "config.json", _exported_config(source, config))


def write_checksums(folder: Path) -> None:
    """Write `SHA256SUMS` of a checkpoint, once all its other files are there.

    Raises:
        WriteError: if it cannot be written.
    """
    with explain_write(folder / checksums.SUMS):
        checksums.write_sums(folder)


def write_shards(nbytes: dict[str, int], read: Callable[[str], torch.Tensor], folder: Path) -> None:
    """Write tensors in shards of at most SHARD_BYTES, with an index where there are several.

    A shard that is there already, from an interrupted run, stays.

    Args:
        nbytes: size by name; a bound will do.
        read: gives a tensor by name.
        folder: of the checkpoint.

    Raises:
        WriteError: if a file cannot be written.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(nbytes):
        if shards[-1] and size + nbytes[name] > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes[name]
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if not (folder / file).exists():
            write_tensors(folder / file, {name: read(name) for name in names}, record_sums=True)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        written = TensorStore(folder)
        total = sum(written.nbytes(name) for name in written.names())
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _exported_config(source: SourceModel, config: QuantConfig) -> dict[str, Any]:
    exported = source.config_dict | {"quantization_config": config.to_dict(), "transformers_weights": GUARD}
    if isinstance(text := exported.get("text_config"), dict):  # classes of the text part alone read only this
        exported["text_config"] = text | {"transformers_weights": GUARD}
    if source.kept_dtype(source.first_linear) != source.stored_dtype:  # float32 has become bfloat16
        exported |= dict.fromkeys({"dtype", "torch_dtype"} & set(exported) or {"dtype"}, "bfloat16")
    if "_name_or_path" in exported:  # may be a folder of the machine that saved the model
        exported["_name_or_path"] = source.name
    return exported
