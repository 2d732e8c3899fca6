"""Writing a butterfly checkpoint whole or not at all, and verifying one tensor by tensor."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from bq_kernels.format import FormatError, QuantConfig, TensorSpec
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from .architecture import InputGroup, input_groups
from .errors import UserError, WriteError
from .model import SourceModel, TensorStore
from .recipes import Recipe

SHARD_BYTES = 2 * 10**9
_COPIED = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "*.jinja",
    "*.model",
)


# ---- writing


@contextlib.contextmanager
def _explain(path: Path):
    """Turn a failed write (no space, no permission, a file-size limit) into a message that names the file."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = "no space left on the device" if "No space left" in str(error) else str(error)
        raise WriteError(f"{path}: could not be written: {reason}") from error


def _commit(temporary: Path, path: Path) -> None:
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file so that it is there whole or not at all.

    Raises:
        WriteError: if it cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    with _explain(path):
        save_file(dict(sorted(tensors.items())), temporary, metadata={"format": "pt"})
        _commit(temporary, path)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file so that it is there whole or not at all.

    Raises:
        WriteError: if it cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    with _explain(path):
        temporary.write_text(json.dumps(data, indent=2) + "\n")
        _commit(temporary, path)


def export(source: SourceModel, blocks: Path, config: QuantConfig, recipe: Recipe, folder: Path) -> None:
    """Assemble the checkpoint: packed layers from `blocks`, everything else from the 16-bit model.

    Args:
        source: the 16-bit model.
        blocks: folder with one safetensors file a decoder block.
        config: goes into config.json.
        recipe: named in the model card.
        folder: written here; must not exist.

    Raises:
        WriteError: if a file cannot be written.
    """
    with _explain(folder):
        folder.mkdir(parents=True)
        for pattern in _COPIED:
            for file in source.folder.glob(pattern):
                shutil.copyfile(file, folder / file.name)
    packed = TensorStore(blocks)
    replaced = {
        f"{source.block_prefix(index)}{name}.weight"
        for index in range(source.num_blocks)
        for group in source.groups
        for name in group.layers
    }
    home = {name: source.store for name in source.store.names() if name not in replaced}
    home |= dict.fromkeys(packed.names(), packed)
    shards: list[list[str]] = [[]]
    size = total = 0
    for name in sorted(home):
        nbytes = home[name].nbytes(name)
        if shards[-1] and size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + nbytes, total + nbytes
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, {name: home[name].get(name) for name in names})
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
    with _explain(folder / "README.md"):
        (folder / "README.md").write_text(_model_card(source, config, recipe))
    write_json(folder / "config.json", source.config_dict | {"quantization_config": config.to_dict()})


def _model_card(source: SourceModel, config: QuantConfig, recipe: Recipe) -> str:
    name = source.config_dict.get("_name_or_path") or source.folder.resolve().name
    rows = "\n".join(f"| {key} | {value} |" for key, value in recipe.to_dict().items())
    return f"""---
library_name: vllm
tags: [butterfly, {config.bits}-bit, quantized]
---

# {name}, {config.bits}-bit butterfly

Weights are {config.bits}-bit integers in a rotated basis ({config.rotation.kind}; ButterflyQuant, arXiv 2509.09679).
Made by `bq-calibrate` of bq-vllm; `bq_report.json` has the measurements.

    vllm serve DIR --quantization butterfly

With transformers: `import bq_calibration.hf` first, then `AutoModelForCausalLM.from_pretrained(DIR)`.

| setting | value |
|---|---|
{rows}
"""


# ---- reading


def read_config(folder: Path) -> tuple[dict[str, Any], QuantConfig]:
    """config.json of a butterfly checkpoint, whole and its quantization part parsed.

    Raises:
        UserError: if there is none, or it is not one that this software reads.
    """
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder}: no config.json; expected the folder of a butterfly checkpoint")
    try:
        data = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not valid JSON ({error})") from error
    if "quantization_config" not in data:
        raise UserError(f"{folder}: not quantized (config.json has no quantization_config)")
    try:
        return data, QuantConfig.from_dict(data["quantization_config"])
    except FormatError as error:
        raise UserError(f"{file}: {error}") from error


def quantized_layers(model: nn.Module, model_type: str, config: QuantConfig) -> dict[str, tuple[nn.Linear, InputGroup]]:
    """The linear layers of a (possibly empty) model that are stored packed, by full name, with their input group."""
    layers = {}
    for group in input_groups(model_type):
        for index in range(len(model.model.layers)):
            for name in group.layers:
                full = f"model.layers.{index}.{name}"
                if not config.skips(full):
                    layers[full] = (model.get_submodule(full), group)
    return layers


@dataclass
class Verified:
    """A checkpoint that passed: its config, and for every packed layer its (N, K) and stored bits by suffix."""

    config: QuantConfig
    layers: dict[str, tuple[int, int]]
    stored_bits: dict[str, int]
    total_bytes: int

    def bits_per_weight(self) -> float:
        """All stored bits of the packed layers over their weights; angles counted once for layers that share them."""
        return sum(self.stored_bits.values()) / sum(n * k for n, k in self.layers.values())


def verify(folder: Path) -> Verified:
    """Check a checkpoint against the format: every tensor's name, shape, dtype, finiteness, and shared angles.

    Raises:
        UserError: naming the file or tensor, what was found and what was expected.
    """
    data, config = read_config(folder)
    store = TensorStore(folder)
    try:
        parsed = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    del parsed.quantization_config
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(parsed)
    tied = set(model.all_tied_weights_keys) if parsed.tie_word_embeddings else set()
    layers = quantized_layers(model, data.get("model_type", ""), config)
    expected: dict[str, TensorSpec | tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if module not in layers or leaf != "weight":
            expected[name] = tuple(tensor.shape)
    try:
        for name, (layer, _) in layers.items():
            for suffix, spec in config.tensors(name, layer.in_features, layer.out_features).items():
                expected[f"{name}.{suffix}"] = spec
        missing = sorted(set(expected) - set(store.names()) - tied)
        if missing:
            raise FormatError(f"tensor {missing[0]} is missing ({len(missing)} in all)")
        surplus = sorted(set(store.names()) - set(expected))
        if surplus:
            raise FormatError(f"tensor {surplus[0]} does not belong to this model ({len(surplus)} in all)")
        bits = dict.fromkeys(("codes", "scales", "zeros", "angles"), 0)
        for name in store.names():
            spec, tensor = expected[name], store.get(name)
            if not isinstance(spec, TensorSpec):
                spec = TensorSpec(spec, tensor.dtype)
            spec.check(name, tensor)
        for name, (layer, group) in layers.items():
            sibling = name.removesuffix(next(part for part in group.layers if name.endswith(part))) + group.layers[0]
            for suffix in config.tensors(name, layer.in_features, layer.out_features):
                if suffix != "angles" or name == sibling:
                    bits["codes" if suffix == "qweight" else suffix] += store.nbytes(f"{name}.{suffix}") * 8
                elif not torch.equal(store.get(f"{name}.angles"), store.get(f"{sibling}.angles")):
                    raise FormatError(
                        f"{name}.angles differs from {sibling}.angles; layers that share an input share one rotation"
                    )
    except FormatError as error:
        raise UserError(f"{folder}: {error}") from error
    shapes = {name: (layer.out_features, layer.in_features) for name, (layer, _) in layers.items()}
    return Verified(config, shapes, bits, sum(store.nbytes(name) for name in store.names()))
