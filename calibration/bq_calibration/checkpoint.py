"""Reading a butterfly checkpoint and verifying it tensor by tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bq_kernels.format import FormatError, QuantConfig, TensorSpec
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .architecture import InputGroup, input_groups
from .errors import UserError
from .skeleton import decoder_name, empty_model, model_names
from .store import TensorStore


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


def quantized_layers(
    model: PreTrainedModel, model_type: str, config: QuantConfig
) -> dict[str, tuple[nn.Linear, InputGroup]]:
    """The linear layers of a (possibly empty) model that are stored packed, by full name, with their input group."""
    layers, decoder = {}, decoder_name(model)
    for group in input_groups(model_type):
        for index in range(len(model.get_submodule(decoder).layers)):
            for name in group.layers:
                full = f"{decoder}.layers.{index}.{name}"
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
        UserError: naming the file or tensor, the value found and the value expected.
    """
    data, config = read_config(folder)
    store = TensorStore(folder)
    try:
        parsed = AutoConfig.from_pretrained(folder)
    except Exception as error:
        raise UserError(f"{folder / 'config.json'}: {error}") from error
    del parsed.quantization_config
    model = empty_model(parsed)
    own = f"{decoder_name(model)}.", "lm_head."  # other parts are called as the original's files call them
    names = model_names(store.names(), model)
    store.rename({name: name if name.startswith(own) else known for name, known in names.items()})
    tied = set(model.all_tied_weights_keys)
    layers = quantized_layers(model, data.get("model_type", ""), config)
    try:
        _check_tensors(store, _expected(model, layers, config), tied)
        bits = _stored_bits(store, layers, config)
    except FormatError as error:
        raise UserError(f"{folder}: {error}") from error
    shapes = {name: (layer.out_features, layer.in_features) for name, (layer, _) in layers.items()}
    return Verified(config, shapes, bits, sum(store.nbytes(name) for name in store.names()))


Layers = dict[str, tuple[nn.Linear, InputGroup]]


def _expected(model: nn.Module, layers: Layers, config: QuantConfig) -> dict[str, TensorSpec | tuple[int, ...]]:
    """Tensors of the checkpoint by name; of those that are not quantized only the shape is known."""
    expected: dict[str, TensorSpec | tuple[int, ...]] = {}
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if module not in layers or leaf != "weight":
            expected[name] = tuple(tensor.shape)
    for name, (layer, _) in layers.items():
        for suffix, spec in config.tensors(name, layer.in_features, layer.out_features).items():
            expected[f"{name}.{suffix}"] = spec
    return expected


def _check_tensors(store: TensorStore, expected: dict[str, TensorSpec | tuple[int, ...]], tied: set[str]) -> None:
    missing = sorted(set(expected) - set(store.names()) - tied)
    if missing:
        raise FormatError(f"tensor {missing[0]} is missing ({len(missing)} in all)")
    surplus = sorted(set(store.names()) - set(expected))
    if surplus:
        raise FormatError(f"tensor {surplus[0]} does not belong to this model ({len(surplus)} in all)")
    for name in store.names():
        spec, tensor = expected[name], store.get(name)
        if not isinstance(spec, TensorSpec):
            spec = TensorSpec(spec, tensor.dtype)
        spec.check(name, tensor)


def _stored_bits(store: TensorStore, layers: Layers, config: QuantConfig) -> dict[str, int]:
    """Bits of the packed layers by part; angles counted once for layers that share them, and equal in all of them."""
    bits = dict.fromkeys(("codes", "scales", "zeros", "angles"), 0)
    for name, (layer, group) in layers.items():
        sibling = name.removesuffix(next(part for part in group.layers if name.endswith(part))) + group.layers[0]
        for suffix in config.tensors(name, layer.in_features, layer.out_features):
            if suffix != "angles" or name == sibling:
                bits["codes" if suffix == "qweight" else suffix] += store.nbytes(f"{name}.{suffix}") * 8
            elif not torch.equal(store.get(f"{name}.angles"), store.get(f"{sibling}.angles")):
                raise FormatError(
                    f"{name}.angles differs from {sibling}.angles; layers that share an input share one rotation"
                )
    return bits
