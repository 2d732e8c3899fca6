"""Reading a butterfly checkpoint and verifying it tensor by tensor."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bq_kernels.format import EMBEDDING, HEAD, FormatError, QuantConfig, TensorSpec
from bq_kernels.shards import tensor_files
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from .architecture import InputGroup, input_groups
from .compute import dtype_name
from .errors import UserError, explain
from .files import read_json
from .skeleton import decoder_name, empty_model, model_names, tied_head
from .store import FLOATS, TensorStore

REPORT = "bq_report.json"


def read_config(folder: Path) -> tuple[dict[str, Any], QuantConfig]:
    """config.json of a butterfly checkpoint, whole and its quantization part parsed.

    Raises:
        UserError: if there is none, or it is not one that this software reads.
    """
    file = folder / "config.json"
    data = read_json(file, missing="expected the folder of a butterfly checkpoint")
    if "quantization_config" not in data:
        raise UserError(f"{folder}: not quantized (config.json has no quantization_config)")
    try:
        return data, QuantConfig.from_dict(data["quantization_config"])
    except FormatError as error:
        raise UserError(f"{file}: {error}") from error


def quantized_layers(model: PreTrainedModel, config: QuantConfig) -> dict[str, tuple[nn.Linear, InputGroup]]:
    """The linear layers of a (possibly empty) model that are stored packed, by full name, with their input group."""
    layers, decoder = {}, decoder_name(model)
    for index, groups in enumerate(input_groups(model)):
        for group in groups:
            for name in (f"{decoder}.layers.{index}.{layer}" for layer in group.layers):
                if not config.skips(name):
                    layers[name] = (model.get_submodule(name), group)
    return layers


def packed_embeddings(model: PreTrainedModel, config: QuantConfig) -> dict[str, nn.Module]:
    """The embedding and the LM head of a (possibly empty) model that are stored packed, by full name."""
    names = f"{decoder_name(model)}.{EMBEDDING}", *(() if tied_head(model) else (HEAD,))
    return {name: model.get_submodule(name) for name in names if config.packs(name)}


@dataclass
class Verified:
    """A checkpoint that passed.

    Attributes:
        config: its quantization config.
        layers: N and K of every packed linear layer, by full name.
        embeddings: the same of the embedding and the LM head, where they are packed.
        stored_bits: of the packed linear layers, by part.
        unquantized_dtypes: number of tensors that are not packed, by dtype.
        weights: of the whole model.
        total_bytes: of all tensors.
    """

    config: QuantConfig
    layers: dict[str, tuple[int, int]]
    embeddings: dict[str, tuple[int, int]]
    stored_bits: dict[str, int]
    unquantized_dtypes: dict[str, int]
    weights: int
    total_bytes: int

    def file_bits_per_weight(self) -> float:
        """Bits of all tensors over the weights of the whole model: embedding, LM head and norms too."""
        return self.total_bytes * 8 / self.weights

    def bits_per_weight(self) -> float:
        """All stored bits of the packed layers over their weights; angles counted once for layers that share them."""
        return sum(self.stored_bits.values()) / sum(n * k for n, k in self.layers.values())


def verify(folder: Path, dtypes: set[str] | None = None) -> Verified:
    """Check a checkpoint against the format: settings, every tensor's name, shape, dtype and values, shared angles.

    Args:
        folder: the checkpoint.
        dtypes: that floats which are not quantized may have; by default those that the run's report says, else that of
            config.json. An exporter may keep norms in another dtype than the embedding.

    Raises:
        UserError: naming the file or tensor, the value found and the value expected.
    """
    data, config = read_config(folder)
    try:
        store = TensorStore(folder, sorted(set(tensor_files(folder).values())))
    except FormatError as error:
        raise UserError(str(error)) from error
    with explain(f"{folder / 'config.json'}: transformers cannot read it"):
        parsed = AutoConfig.from_pretrained(folder)
        del parsed.quantization_config
        model = empty_model(parsed)
    own = f"{decoder_name(model)}.", "lm_head."  # other parts are called as the original's files call them
    names = model_names(folder, store.names(), model)
    store.rename({name: name if name.startswith(own) else known for name, known in names.items()})
    tied = set(model.all_tied_weights_keys)
    layers, embeddings = quantized_layers(model, config), packed_embeddings(model, config)
    shapes = {name: tuple(layer.weight.shape) for name, (layer, _) in layers.items()}
    tables = {name: tuple(module.weight.shape) for name, module in embeddings.items()}
    try:
        _check_settings(config, {*layers, *embeddings}, {*dict(model.named_modules()), *store.names()})
        _check_blocks(config, layers)
        if tied_head(model) and tables and config.skips(HEAD):
            raise FormatError(f"modules_to_not_convert: {HEAD} is tied to {next(iter(tables))}, which is packed")
        dtypes = dtypes or _stated_dtypes(folder, data)
        expected = _expected(model, shapes | tables, config)
        kept = _check_tensors(store, expected, tied, dtypes)
        bits = _stored_bits(store, layers, config)
    except FormatError as error:
        raise UserError(f"{folder}: {error}") from error
    weights = sum(n * k for n, k in (shapes | tables).values())
    weights += sum(tensor.numel() for name, tensor in expected.items() if name in store and torch.is_tensor(tensor))
    return Verified(config, shapes, tables, bits, kept, weights, sum(store.nbytes(name) for name in store.names()))


Layers = dict[str, tuple[nn.Linear, InputGroup]]


def _stated_dtypes(folder: Path, config: dict[str, Any]) -> set[str]:
    """Dtypes that unquantized floats may have, as the run's report says, else as config.json does; empty if unsaid."""
    report = read_report(folder)
    if report and isinstance(stated := report.get("unquantized_dtypes"), dict):
        return set(stated)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    stated = {part.get("dtype", part.get("torch_dtype")) for part in parts}
    return {dtype.removeprefix("torch.") for dtype in stated if isinstance(dtype, str) and dtype != "auto"}


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report of the run that wrote a checkpoint; None where there is none.

    Raises:
        UserError: if it is damaged.
    """
    file = folder / REPORT
    if not file.is_file():
        return None
    try:
        return read_json(file, missing="")
    except UserError as error:
        raise UserError(f"{file}: not a report of bq-calibrate ({error}); download it again, or delete it") from error


def _check_settings(config: QuantConfig, layers: set[str], names: set[str]) -> None:
    """Refuse settings for modules that the model does not have.

    Args:
        config: the settings.
        layers: names of the packed layers, embedding and LM head among them.
        names: of all modules and tensors.
    """
    if wrong := sorted(set(config.module_bits) - layers):
        raise FormatError(f"module_bits: the model has no packed layer {wrong[0]}")
    kinds = {name.rpartition(".")[2] for name in layers}
    if wrong := sorted(set(config.rotation.block_size) - kinds - {"default"}):
        raise FormatError(f"rotation.block_size: no packed layer is called {wrong[0]}; they are {sorted(kinds)}")
    for skipped in config.modules_to_not_convert:
        if skipped != HEAD and not any(f".{skipped}." in f".{name}." for name in names):
            raise FormatError(f"modules_to_not_convert: the model has no module {skipped}")


def _first(name: str, group: InputGroup) -> str:
    """Full name of the first layer of the group to which the layer of that full name belongs."""
    return name.removesuffix(next(part for part in group.layers if name.endswith(part))) + group.layers[0]


def _check_blocks(config: QuantConfig, layers: Layers) -> None:
    """Refuse rotation blocks of different sizes in front of layers that share an input."""
    for name, (_, group) in layers.items():
        block, first = config.rotation.block(name), _first(name, group)
        if first in layers and block != config.rotation.block(first):
            raise FormatError(
                f"rotation.block_size: {block} for {name}, {config.rotation.block(first)} for {first}; layers that "
                "share an input share one rotation"
            )


def _expected(
    model: PreTrainedModel, packed: dict[str, tuple[int, int]], config: QuantConfig
) -> dict[str, TensorSpec | torch.Tensor]:
    """Tensors of the checkpoint by name; of those that are not quantized, the empty model's.

    Args:
        model: the empty model.
        packed: N and K of all that is stored packed, by full name.
        config: the checkpoint's format.
    """
    without = {f"{name}.weight" for name in packed}
    # a tensor that is tied to a packed one is not stored
    without |= {tied for tied, source in model.all_tied_weights_keys.items() if source in without}
    expected: dict[str, TensorSpec | torch.Tensor] = {
        name: tensor for name, tensor in model.state_dict().items() if name not in without
    }
    for name, (rows, columns) in packed.items():
        for suffix, spec in config.tensors(name, columns, rows).items():
            expected[f"{name}.{suffix}"] = spec
    return expected


def _check_tensors(
    store: TensorStore, expected: dict[str, TensorSpec | torch.Tensor], tied: set[str], dtypes: set[str]
) -> dict[str, int]:
    """Check every tensor; returns how many tensors that are not quantized have which dtype."""
    missing = sorted(set(expected) - set(store.names()) - tied)
    if missing:
        raise FormatError(f"tensor {missing[0]} is missing ({len(missing)} in all)")
    surplus = sorted(set(store.names()) - set(expected))
    if surplus:
        raise FormatError(f"tensor {surplus[0]} does not belong to this model ({len(surplus)} in all)")
    kept: Counter[str] = Counter()
    for name in store.names():
        spec, tensor = expected[name], store.get(name)
        if isinstance(spec, torch.Tensor):
            kept[dtype_name(tensor.dtype)] += 1
            spec = _unquantized(name, spec, tensor.dtype, dtypes)
        spec.check(name, tensor)
    return dict(sorted(kept.items()))


def _unquantized(name: str, model: torch.Tensor, dtype: torch.dtype, stated: set[str]) -> TensorSpec:
    """Shape of the model's tensor, and its dtype; of floats that found, where the checkpoint states it, or nothing."""
    if not model.is_floating_point():
        return TensorSpec(tuple(model.shape), model.dtype)
    allowed = stated or {dtype_name(float_type) for float_type in FLOATS}
    if dtype_name(dtype) not in allowed:
        raise FormatError(f"{name}: expected {' or '.join(sorted(allowed))}, found {dtype_name(dtype)}")
    return TensorSpec(tuple(model.shape), dtype)


def _stored_bits(store: TensorStore, layers: Layers, config: QuantConfig) -> dict[str, int]:
    """Bits of the packed layers by part; angles counted once for layers that share them, and equal in all of them."""
    bits = dict.fromkeys(("codes", "scales", "zeros", "angles"), 0)
    for name, (layer, group) in layers.items():
        sibling = _first(name, group)
        for suffix in config.tensors(name, layer.in_features, layer.out_features):
            if suffix != "angles" or name == sibling:
                bits["codes" if suffix == "qweight" else suffix] += store.nbytes(f"{name}.{suffix}") * 8
            elif not torch.equal(store.get(f"{name}.angles"), store.get(f"{sibling}.angles")):
                raise FormatError(
                    f"{name}.angles differs from {sibling}.angles; layers that share an input share one rotation"
                )
    return bits
