"""A checkpoint that another package quantized: what every format gives, and what Hugging Face folders share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from bq_kernels.format import QuantConfig
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..architecture import check_architecture, input_groups, other_matrices
from ..checkpoint import quantized_layers
from ..errors import UserError, explain
from ..files import copy_carried
from ..inspection import check_tokenizer
from ..model import hub_name
from ..skeleton import decoder_name, empty_model, model_names, other_parts
from ..store import FLOATS, TensorStore
from .layer import Levels


class Source(ABC):
    """A checkpoint whose linear layers have integer codes.

    Attributes:
        method: the quantization method and how it is packed, for the report.
        quantization: the source's own settings, for the report.
        folder: of the checkpoint.
        config_dict: config.json of the model, without its quantization.
        skeleton: the model, without memory.
        layers: (N, K) of every quantized layer, by the model's name.
        kept: the model's names of the tensors that are not quantized.
    """

    method: str
    quantization: dict[str, Any]
    folder: Path
    config_dict: dict[str, Any]
    skeleton: PreTrainedModel
    layers: dict[str, tuple[int, int]]
    kept: list[str]

    @property
    def name(self) -> str:
        """`org/name` for a model of the hub, else its folder's."""
        return hub_name(self.folder)

    @abstractmethod
    def bits(self, layer: str) -> int:
        """Bits per code."""

    @abstractmethod
    def levels(self, layer: str) -> Levels:
        """Scales and zero points, [N, K/group].

        Raises:
            UserError: if the layer has them in a form that the format does not know.
        """

    @abstractmethod
    def codes(self, layer: str) -> torch.Tensor:
        """Codes, uint8 [N, K]."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """A tensor that is not quantized."""

    @abstractmethod
    def nbytes(self, name: str) -> int:
        """Size of a tensor that is not quantized, or a bound of it, without reading it."""

    @property
    @abstractmethod
    def stored_bytes(self) -> int:
        """Size of all tensors of the source."""

    @abstractmethod
    def write_files(self, folder: Path) -> None:
        """Write tokenizer and all else but weights, config.json and the card into a checkpoint's folder."""

    def model_layers(self) -> dict[str, nn.Linear]:
        """The linear layers of the decoder, by name."""
        every = quantized_layers(self.skeleton, QuantConfig())
        return {name: linear for name, (linear, _) in every.items()}

    def routers(self) -> list[str]:
        """Names inside a decoder layer of matrices that are no linear layers of its groups."""
        layers = zip(self.skeleton.get_decoder().layers, input_groups(self.skeleton), strict=True)
        return sorted({name for layer, groups in layers for name in other_matrices(layer, groups)})

    def check_fused(self) -> None:
        """Refuse layers that share an input and are quantized differently: vLLM fuses them.

        Raises:
            UserError: naming two of them.
        """
        prefix = f"{decoder_name(self.skeleton)}.layers."
        for index, groups in enumerate(input_groups(self.skeleton)):
            for group in groups:
                names = [f"{prefix}{index}.{name}" for name in group.layers]
                kinds = {name: self.bits(name) if name in self.layers else None for name in names}
                if len(set(kinds.values())) > 1:
                    kinds = {name.rpartition(".")[2]: kind or "unquantized" for name, kind in kinds.items()}
                    raise UserError(
                        f"{names[0]}: bits of layers that share an input differ ({kinds}); vLLM fuses these layers, "
                        "they need the same"
                    )


def check_text_model(folder: Path, model: PreTrainedModel) -> None:
    """Refuse a model with more parts than a text decoder.

    Raises:
        UserError: saying which.
    """
    if parts := other_parts(model):
        raise UserError(f"{folder}: a multimodal model ({', '.join(parts)}); only text models are converted")


class FolderSource(Source):
    """A Hugging Face folder with safetensors, in which a quantized layer X has tensors X.*suffix* in place of X.weight.

    Args:
        folder: of the checkpoint.
        config: its config.json.

    Raises:
        UserError: if tensors are missing or surplus, or nothing is quantized.
    """

    codes_suffix: str  # of the packed codes
    suffixes: tuple[str, ...]  # of all that a quantized layer has, its bias left out

    def __init__(self, folder: Path, config: dict[str, Any]):
        self.folder = folder
        self.quantization = config.get("quantization_config", {})
        self.config_dict = {key: value for key, value in config.items() if key != "quantization_config"}
        check_architecture(config.get("model_type", "without a model_type"))
        self.store = TensorStore.of_model(folder)
        with explain(f"{folder / 'config.json'}: transformers cannot read it"):
            parsed = AutoConfig.from_pretrained(folder)
            if hasattr(parsed, "quantization_config"):
                del parsed.quantization_config
            self.skeleton = empty_model(parsed)
        check_text_model(folder, self.skeleton)
        check_tokenizer(folder)
        self.store.rename(model_names(folder, self.store.names(), self.skeleton))
        linears = self.model_layers()
        self.layers = {
            name: (linear.out_features, linear.in_features)
            for name, linear in linears.items()
            if f"{name}.{self.codes_suffix}" in self.store
        }
        if not self.layers:
            raise UserError(f"{folder}: no linear layer has a tensor {self.codes_suffix}, nothing is quantized there")
        self.kept = self._kept()

    def _kept(self) -> list[str]:
        """Names of the unquantized tensors, once all that the model has is there and nothing else."""
        packed = {f"{name}.{suffix}" for name in self.layers for suffix in self.suffixes}
        replaced = {f"{name}.weight" for name in self.layers}
        expected = {name: tensor for name, tensor in self.skeleton.state_dict().items() if name not in replaced}
        stored = set(self.store.names()) - packed
        tied = set(self.skeleton.all_tied_weights_keys)
        if missing := sorted(set(expected) - stored - tied):
            raise UserError(f"{self.folder}: tensor {missing[0]} is missing ({len(missing)} in all)")
        # some packages give every layer a bias, of zeros where the model has none
        surplus = [name for name in sorted(stored - set(expected)) if not self._is_empty_bias(name)]
        if surplus:
            raise UserError(
                f"{self.folder}: tensor {surplus[0]} has no place in the format ({len(surplus)} such tensors); only "
                "linear layers of the decoder can be quantized"
            )
        for name in sorted(stored & set(expected)):
            if self.store.shape(name) != tuple(expected[name].shape) or self.store.dtype(name) not in FLOATS:
                raise UserError(
                    f"{self.folder}: tensor {name}: expected floats {list(expected[name].shape)}, found "
                    f"{self.store.dtype(name)} {list(self.store.shape(name))}"
                )
        return sorted(stored & set(expected))

    def _is_empty_bias(self, name: str) -> bool:
        layer, _, leaf = name.rpartition(".")
        return leaf == "bias" and layer in self.layers and not bool(self.store.get(name).any())

    def expect(self, name: str, *shape: int) -> torch.Tensor:
        """A tensor of the source that must have a shape.

        Raises:
            UserError: if it is missing or has another one.
        """
        if self.store.shape(name) != shape:
            raise UserError(
                f"{self.folder}: tensor {name}: expected {list(shape)}, found {list(self.store.shape(name))}"
            )
        return self.store.get(name)

    def tensor(self, name: str) -> torch.Tensor:
        """See `Source`."""
        return self.store.get(name)

    def nbytes(self, name: str) -> int:
        """See `Source`."""
        return self.store.nbytes(name)

    @property
    def stored_bytes(self) -> int:
        """See `Source`."""
        return sum(self.store.nbytes(name) for name in self.store.names())

    def write_files(self, folder: Path) -> None:
        """See `Source`."""
        copy_carried(self.folder, folder)
