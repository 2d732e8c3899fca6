"""GGUF: block types with one float16 scale per 32 or more codes (`gguf_file.BLOCK_TYPES`)."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from transformers import AutoConfig, AutoTokenizer

from ..architecture import check_architecture
from ..errors import UserError, explain
from ..files import copy_carried, read_json
from ..inspection import check_tokenizer
from ..model import hub_name
from ..skeleton import empty_model
from .gguf_file import BLOCK_TYPES, GgufFile
from .layer import Levels
from .source import Source, check_text_model

# of llama.cpp; llama stands for mistral too. Other architectures change norms or split tensors on the way to GGUF
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
_FLOAT_TYPES = ("F32", "F16", "BF16")
_REASONS = {
    **dict.fromkeys(("Q2_K", "Q3_K", "Q6_K"), "has groups of 16 columns; the format's are multiples of 32"),
    **dict.fromkeys(("Q4_K", "Q5_K"), "has scales that are products of two numbers, not float16"),
    "Q4_1": "has a minimum per group, whose ratio to the scale is no float16 number",
    **dict.fromkeys(("Q5_0", "Q5_1", "Q8_0", "Q8_1", "Q8_K"), "has more than 4 bits"),
    **dict.fromkeys(("MXFP4", "NVFP4"), "has levels that are not evenly spaced"),
}


class GgufSource(Source):
    """A GGUF file. config.json and tokenizer are those beside it, else they are made from its metadata.

    Args:
        file: the file.

    Raises:
        UserError: for an architecture, a type or metadata that a checkpoint of ours cannot stand for.
    """

    def __init__(self, file: Path):
        self.file, self.folder = GgufFile(file), file.parent
        self._check_metadata()
        beside = self.folder / "config.json"
        self._own_config = beside.is_file()
        if self._own_config:
            self.config_dict = read_json(beside, missing="")
            if "quantization_config" in self.config_dict:
                raise UserError(f"{beside}: is of another quantized model; put the original's beside {file.name}")
            with explain(f"{beside}: transformers cannot read it"):
                config = AutoConfig.from_pretrained(self.folder)
            check_tokenizer(self.folder)
        else:
            config, self._tokenizer = self._from_metadata()
            self.config_dict = json.loads(config.to_json_string())
        self.skeleton = empty_model(config)
        self.config_dict.setdefault("architectures", [type(self.skeleton).__name__])
        check_architecture(config.model_type)
        check_text_model(self.folder, self.skeleton)
        self._places = self._match_names(config.num_hidden_layers)
        self._heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
        self.layers = self._quantized_layers()
        self.kept = [name for name in self._places if name.removesuffix(".weight") not in self.layers]
        types = sorted({self._info(layer).type_name for layer in self.layers})
        self.method, self.quantization = f"GGUF {', '.join(types)}", {"file": file.name}

    @property
    def name(self) -> str:
        """See `Source`."""
        return known if "/" in (known := hub_name(self.folder)) else self.file.path.stem

    def _check_metadata(self) -> None:
        file, architecture = self.file, self.file.value("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise UserError(f"{file.path}: architecture {architecture!r} is not read; {', '.join(_ARCHITECTURES)} are")
        if (file.value("split.count") or 1) > 1:
            raise UserError(f"{file.path}: one part of several; join them with llama.cpp's gguf-split --merge")
        if any(key.startswith("prism.hadamard") for key in file.fields):
            raise UserError(
                f"{file.path}: weights behind a signed Hadamard transform (prism.hadamard); its signs need angles "
                "that float16 does not hold exactly, and embedding and head are rotated too"
            )

    def _from_metadata(self) -> tuple[Any, Any]:
        """Config and tokenizer as transformers makes them from the metadata."""
        architecture, file = self.file.value("general.architecture"), self.file
        hint = f"put the original's config.json and tokenizer beside {file.path.name}"
        if (scaling := file.value(f"{architecture}.rope.scaling.type")) not in (None, "none"):
            raise UserError(f"{file.path}: rope scaling {scaling!r} is not read from the metadata; {hint}")
        with tempfile.TemporaryDirectory() as folder, explain(f"{file.path}: no config or tokenizer; {hint}"):
            file.write_metadata(Path(folder) / "metadata.gguf")
            config = AutoConfig.from_pretrained(folder, gguf_file="metadata.gguf")
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="metadata.gguf")
        config.tie_word_embeddings = "output.weight" not in file.infos
        return config, tokenizer

    def _match_names(self, blocks: int) -> dict[str, str]:
        """GGUF's name by the model's, once all that the model has is there and nothing else."""
        architecture = self.file.value("general.architecture")
        arch = next(arch for arch, known in MODEL_ARCH_NAMES.items() if known == architecture)
        table, places = get_tensor_name_map(arch, blocks), {}
        tied = set(self.skeleton.all_tied_weights_keys)
        for name, tensor in self.skeleton.state_dict().items():
            base, _, suffix = name.rpartition(".")
            place = f"{table.get_name(base)}.{suffix}"
            if place not in self.file.infos:
                if name in tied:
                    continue
                raise UserError(f"{self.file.path}: tensor {place} ({name}) is missing")
            if self.file.infos[place].shape != tuple(tensor.shape):
                found = list(self.file.infos[place].shape)
                raise UserError(f"{self.file.path}: tensor {place}: expected {list(tensor.shape)}, found {found}")
            places[name] = place
        if surplus := sorted(set(self.file.infos) - set(places.values())):
            raise UserError(f"{self.file.path}: tensor {surplus[0]} has no place in a {type(self.skeleton).__name__}")
        return places

    def _quantized_layers(self) -> dict[str, tuple[int, int]]:
        layers = {}
        for name, linear in self.model_layers().items():
            kind = self._info(name)
            if kind.type in BLOCK_TYPES:
                layers[name] = (linear.out_features, linear.in_features)
            elif kind.type_name not in _FLOAT_TYPES:
                reason = _REASONS.get(kind.type_name, "has levels of a code book")
                raise UserError(f"{self._places[f'{name}.weight']}: type {kind.type_name} {reason}")
        if not layers:
            raise UserError(f"{self.file.path}: no linear layer is quantized there")
        return layers

    def _info(self, layer: str):
        return self.file.infos[self._places[f"{layer}.weight"]]

    def _ordered(self, place: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows in the model's order: GGUF files of architecture llama have the two halves of a head interleaved."""
        heads = self._heads.get(place.split(".")[-2])
        if self.file.value("general.architecture") != "llama" or heads is None:
            return rows
        return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)

    def bits(self, layer: str) -> int:
        """See `Source`."""
        return BLOCK_TYPES[self._info(layer).type].bits

    def levels(self, layer: str) -> Levels:
        """See `Source`."""
        place = self._places[f"{layer}.weight"]
        scales = self._ordered(place, self.file.scales(place))
        return Levels(scales, torch.full_like(scales, BLOCK_TYPES[self._info(layer).type].zero))

    def codes(self, layer: str) -> torch.Tensor:
        """See `Source`."""
        place = self._places[f"{layer}.weight"]
        return self._ordered(place, self.file.codes(place))

    def tensor(self, name: str) -> torch.Tensor:
        """See `Source`."""
        place = self._places[name]
        return self._ordered(place, self.file.floats(place)).contiguous()

    def nbytes(self, name: str) -> int:
        """See `Source`."""
        return self.skeleton.state_dict()[name].numel() * 4

    @property
    def stored_bytes(self) -> int:
        """See `Source`."""
        return sum(info.end - info.begin for info in self.file.infos.values())

    def write_files(self, folder: Path) -> None:
        """See `Source`."""
        if self._own_config:
            copy_carried(self.folder, folder)
        else:
            self._tokenizer.save_pretrained(folder)
