"""A Hugging Face causal LM read from its safetensors, one decoder layer at a time."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from .architecture import input_groups
from .block import Block
from .compute import compute_dtypes
from .errors import UserError

_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}


def resolve_model(model: str) -> Path:
    """Local folder of a model: a path as it is, a hub name through the Hugging Face cache.

    Raises:
        UserError: if there is no such model.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{model} is a file; expected the folder of a Hugging Face model or a name on the hub")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.jinja"]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:
        raise UserError(f"{model}: no such folder, and the hub did not give it ({error})") from error


class TensorStore:
    """Tensors of a folder's safetensors files, by name, read on demand.

    Raises:
        UserError: from the constructor, if there are no safetensors files or one cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise UserError(
                f"{folder}: no .safetensors file; convert the weights first (nothing is ever unpickled here)"
            )
        self.file_of: dict[str, Path] = {}
        for file in files:
            try:
                with safe_open(file, framework="pt") as handle:
                    self.file_of.update(dict.fromkeys(handle.keys(), file))
            except (SafetensorError, OSError) as error:
                raise UserError(f"{file}: cannot be read, truncated or damaged ({error}); get it again") from error
        index = folder / "model.safetensors.index.json"
        if index.exists():
            listed = json.loads(index.read_text())["weight_map"]
            missing = sorted(set(listed) - set(self.file_of))
            if missing:
                raise UserError(f"{folder / listed[missing[0]]}: tensor {missing[0]} of the index is not there")

    def __contains__(self, name: str) -> bool:
        return name in self.file_of

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self.file_of)

    def get(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            UserError: if it is missing.
        """
        if name not in self.file_of:
            raise UserError(f"{self.folder}: tensor {name} is missing")
        with safe_open(self.file_of[name], framework="pt") as handle:
            return handle.get_tensor(name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor, without reading its data."""
        with safe_open(self.file_of[name], framework="pt") as handle:
            return handle.get_slice(name)[:0].dtype

    def nbytes(self, name: str) -> int:
        """Size of a tensor's data, without reading it."""
        with safe_open(self.file_of[name], framework="pt") as handle:
            view = handle.get_slice(name)
            return math.prod(view.get_shape()) * _BYTES[view.get_dtype()]


class SourceModel:
    """The 16-bit model: a skeleton without memory, into which one decoder layer at a time is loaded.

    Args:
        model: folder or hub name.
        device: where layers and activations live.
        compute_dtype: see `compute.compute_dtypes`.

    Attributes:
        dtype: of weights and activations in memory.
        training_dtype: of the products of layers that are trained.

    Raises:
        UserError: for an unsupported architecture, an already quantized model, or missing weights.
    """

    def __init__(self, model: str, device: torch.device, compute_dtype: str = "auto"):
        self.folder = resolve_model(model)
        self.device = device
        config_file = self.folder / "config.json"
        if not config_file.exists():
            raise UserError(f"{self.folder}: no config.json; is this the folder of a Hugging Face model?")
        self.config_dict: dict[str, Any] = json.loads(config_file.read_text())
        if "quantization_config" in self.config_dict:
            method = self.config_dict["quantization_config"].get("quant_method")
            raise UserError(f"{self.folder}: already quantized ({method}); calibration starts from the 16-bit model")
        self.groups = input_groups(self.config_dict.get("model_type", "without a model_type"))
        self.config = AutoConfig.from_pretrained(self.folder)
        self.store = TensorStore(self.folder)
        self.compute = compute_dtypes(compute_dtype, self.store.get("model.embed_tokens.weight").dtype, device)
        self.dtype, self.training_dtype = self.compute.forward, self.compute.training
        with init_empty_weights(include_buffers=False):  # buffers are computed, not stored: they must be real
            self.skeleton = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype).eval()
        for module in self.skeleton.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer.to(device) if buffer is not None else None
        self.decoder = self.skeleton.model
        self.num_blocks = len(self.decoder.layers)
        self._kwargs: list[dict[str, Any]] = [{} for _ in self.decoder.layers]

    @property
    def name(self) -> str:
        """The model's name: `org/name` for a model of the hub, its cached snapshots included; else its folder's."""
        folder = self.folder.resolve()
        if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
            return folder.parents[1].name.removeprefix("models--").replace("--", "/", 1)
        return folder.name

    def tokenizer(self):
        """The model's tokenizer.

        Raises:
            UserError: if the folder has none.
        """
        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except Exception as error:
            raise UserError(f"{self.folder}: the tokenizer cannot be loaded ({error})") from error

    @contextmanager
    def _loaded(self, module: nn.Module, prefix: str) -> Iterator[nn.Module]:
        empty = module.state_dict()
        full = {name: self.store.get(prefix + name).to(self.device, tensor.dtype) for name, tensor in empty.items()}
        module.load_state_dict(full, assign=True)
        del full
        try:
            yield module
        finally:
            module.load_state_dict(empty, assign=True)

    def block_prefix(self, index: int) -> str:
        """Name prefix of the tensors of decoder layer `index`."""
        return f"model.layers.{index}."

    def empty_block(self, index: int) -> Block:
        """Decoder layer `index` without weights: for names and shapes."""
        prefix = self.block_prefix(index)
        return Block(index, prefix, self.decoder.layers[index], self.groups, self._kwargs[index])

    @contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """Decoder layer `index`, with its weights in memory for as long as the context lasts.

        It runs on what the last call of `embed` returned, and on any batch of that sequence length.
        """
        block = self.empty_block(index)
        with self._loaded(block.module, block.prefix):
            yield block

    def final_norm(self) -> AbstractContextManager[nn.Module]:
        """The norm behind the last layer, with its weight in memory for as long as the context lasts."""
        return self._loaded(self.decoder.norm, "model.norm.")

    def head(self) -> AbstractContextManager[nn.Module]:
        """The LM head, with its weight in memory for as long as the context lasts; it may be the embedding's."""
        own = "lm_head.weight" in self.store
        return self._loaded(self.skeleton.lm_head, "lm_head." if own else "model.embed_tokens.")

    @torch.no_grad()
    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Hidden states in front of the first layer; also notes the further arguments that every layer gets.

        Args:
            tokens: int64 [samples, seqlen].

        Returns:
            [samples, seqlen, hidden] in `dtype`.
        """

        def record(index):
            def forward(hidden_states, *args, **kwargs):
                if args:
                    raise UserError(f"{self.config.model_type}: layers take positional arguments, not supported")
                self._kwargs[index] = kwargs  # made for a batch of one, good for any batch
                return hidden_states

            return forward

        norm, self.decoder.norm = self.decoder.norm, nn.Identity()
        for index, layer in enumerate(self.decoder.layers):
            layer.forward = record(index)
        try:
            with self._loaded(self.decoder.embed_tokens, "model.embed_tokens."):
                rows = [self.decoder(input_ids=row[None], use_cache=False)[0] for row in tokens.to(self.device)]
        finally:
            for layer in self.decoder.layers:
                del layer.forward
            self.decoder.norm = norm
        return torch.cat(rows)
