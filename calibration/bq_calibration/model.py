"""A Hugging Face causal LM read from its safetensors, one decoder layer at a time."""

from __future__ import annotations

import functools
import logging
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from bq_kernels.format import EMBEDDING, HEAD
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from . import parallel
from .architecture import InputGroup, check_architecture, input_groups
from .block import Block
from .compute import compute_dtypes
from .errors import UserError, explain
from .experts import split_tensors
from .files import WEIGHTS, read_json
from .on_demand import LinearOnDemand, on_demand
from .skeleton import decoder_name, empty_model, model_names, other_parts, tied_head
from .store import FLOATS, TensorStore

logger = logging.getLogger(__name__)

# tensors that older versions of transformers stored beside the weights and newer ones compute
_STALE = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias|\.rotary_pos_emb\.inv_freq|\.position_ids)$")

# how transformers undoes the quantization that gpt-oss comes with
_FROM_MXFP4 = ": from_pretrained(…, quantization_config=Mxfp4Config(dequantize=True)).save_pretrained"


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
        other_weights = [*WEIGHTS, "*/*.safetensors", "consolidated*", "adapter_*"]
        return Path(snapshot_download(model, ignore_patterns=other_weights))
    except Exception as error:
        raise UserError(f"{model}: no such folder, and the hub did not give it ({error})") from error


def hub_name(folder: Path) -> str:
    """Name of the model in a folder: `org/name` for a cached one of the hub, else the folder's."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        return folder.parents[1].name.removeprefix("models--").replace("--", "/", 1)
    return folder.name


class SourceModel:
    """The 16-bit model: a skeleton without memory, into which one decoder layer at a time is loaded.

    Args:
        model: folder or hub name.
        device: where layers and activations live.
        compute_dtype: see `compute.compute_dtypes`.
        unquantized_dtype: `auto` or `source`, see `kept_dtype`.

    Attributes:
        groups: input groups of every decoder layer.
        first_linear: name of the first linear layer's weight.
        stored_dtype: of that weight, the model's main dtype.
        dtype: of weights and activations in memory.
        training_dtype: of the products of layers that are trained.
        experts_on_demand: whether `block` reads the weights of experts for every use, and keeps none in memory.

    Raises:
        UserError: for an unsupported architecture, an already quantized model, or missing weights.
    """

    def __init__(self, model: str, device: torch.device, compute_dtype: str = "auto", unquantized_dtype: str = "auto"):
        self.unquantized_dtype, self.experts_on_demand = unquantized_dtype, False
        self.folder = resolve_model(model)
        self.device = device
        self.config_dict = read_json(self.folder / "config.json", missing="is this the folder of a Hugging Face model?")
        if quantization := self.config_dict.get("quantization_config"):
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            wanted = "the 16-bit model" + (_FROM_MXFP4 if method == "mxfp4" else "")
            raise UserError(f"{self.folder}: already quantized ({method}); calibration starts from {wanted}")
        check_architecture(self.config_dict.get("model_type", "without a model_type"))
        self.store = TensorStore.of_model(self.folder)
        split_tensors(self.store, self.config_dict["model_type"])
        with explain(f"{self.folder / 'config.json'}: transformers cannot read it"):
            self.config = AutoConfig.from_pretrained(self.folder)
            self.skeleton = empty_model(self.config)
        self.text_config, self.groups = self.config.get_text_config(), input_groups(self.skeleton)
        self.decoder_name, self.other_parts = decoder_name(self.skeleton), other_parts(self.skeleton)
        self.decoder = self.skeleton.get_submodule(self.decoder_name)
        self._replaced: dict[str, torch.Tensor] = {}
        self._match_names()
        self.first_linear = f"{self.block_prefix(0)}{self.groups[0][0].layers[0]}.weight"
        self.stored_dtype = self.store.dtype(self.first_linear)
        # a CPU is measured: the first process does it for all
        self.compute = parallel.from_first(lambda: compute_dtypes(compute_dtype, self.stored_dtype, device))
        self.dtype, self.training_dtype = self.compute.forward, self.compute.training
        for parameter in self.skeleton.parameters():  # buffers keep their own dtype: positions need float32
            parameter.data = parameter.data.to(self.dtype)
        for module in self.skeleton.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer.to(device) if buffer is not None else None
        self.num_blocks = len(self.decoder.layers)
        self._kwargs: list[dict[str, Any]] = [{} for _ in self.decoder.layers]

    def share_of_tokens(self, group: InputGroup) -> float:
        """Share of all tokens that a layer of a group reads: an expert's those that choose it, on average."""
        return getattr(self.text_config, "num_experts_per_tok", 1) / group.experts if group.experts else 1.0

    def _match_names(self) -> None:
        """Call stored tensors as the model does, drop stale ones, and refuse a model that is not whole.

        Only tensors of the decoder and the LM head get new names. Those of a vision tower go into the checkpoint as
        they are called here, for vLLM does not know all names that transformers gives them.
        """
        expected = {name: tuple(tensor.shape) for name, tensor in self.skeleton.state_dict().items()}
        tied = set(self.skeleton.all_tied_weights_keys)
        stored = [name for name in self.store.names() if not _STALE.search(name)]
        if stale := len(self.store.names()) - len(stored):
            logger.info("%d stale buffers beside the weights are left out (rotary_emb.inv_freq and the like)", stale)
        names = model_names(self.folder, stored, self.skeleton)
        missing = sorted(set(expected) - set(names.values()) - tied)
        kind, surplus = type(self.skeleton).__name__, sorted(set(names.values()) - set(expected))
        if missing:
            beside = f"; {surplus[0]} is there and does not belong to it" if surplus else ""
            raise UserError(
                f"{self.folder}: tensor {missing[0]} of a {kind} is missing ({len(missing)} in all){beside}; "
                "give the folder of a whole model"
            )
        if surplus:
            raise UserError(
                f"{self.folder}: tensor {surplus[0]} does not belong to a {kind} ({len(surplus)} in all); "
                "a model with another head or more parts is not supported"
            )
        in_file = {known: name for name, known in names.items()}
        for name, shape in [(in_file[known], shape) for known, shape in expected.items() if known in in_file]:
            if self.store.shape(name) != shape:
                raise UserError(
                    f"{self.folder}: tensor {name}: expected {list(shape)} by config.json, "
                    f"found {list(self.store.shape(name))}"
                )
            if self.store.dtype(name) not in FLOATS:
                raise UserError(f"{self.folder}: tensor {name} holds {self.store.dtype(name)}; give the 16-bit model")
        own = f"{self.decoder_name}.", "lm_head."
        self.store.rename({name: known if known.startswith(own) else name for name, known in names.items()})

    @property
    def name(self) -> str:
        """The model's name: `org/name` for a model of the hub, its cached snapshots included; else its folder's."""
        return hub_name(self.folder)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return self.decoder.embed_tokens.num_embeddings

    def kept_dtype(self, name: str) -> torch.dtype:
        """Dtype in which the checkpoint holds a tensor that is not quantized.

        With `auto` that is bfloat16 where the source has 32 bits or more: embeddings of a 2-bit model in float32 would
        be most of its bytes. Buffers, such as the bias of a router, keep their bits.
        """
        stored = self.store.dtype(name)
        wide = stored.itemsize > 2 and stored.is_floating_point and name not in self.buffer_names
        return torch.bfloat16 if wide and self.unquantized_dtype == "auto" else stored

    def tokenizer(self):
        """The model's tokenizer.

        Raises:
            UserError: if the folder has none.
        """
        with explain(f"{self.folder}: the tokenizer cannot be loaded"):
            return AutoTokenizer.from_pretrained(self.folder)

    def read(self, name: str) -> torch.Tensor:
        """A tensor of the model as it is stored.

        Raises:
            UserError: if it holds NaN or infinity.
        """
        tensor = self._replaced[name] if name in self._replaced else self.store.get(name)
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{self.folder}: tensor {name} holds NaN or infinity; the model is damaged, get it again")
        return tensor

    @contextmanager
    def replaced(self, tensors: dict[str, torch.Tensor]) -> Iterator[None]:
        """Let `read`, and so all that is loaded, give these tensors in place of the stored ones."""
        self._replaced = tensors
        try:
            yield
        finally:
            self._replaced = {}

    @contextmanager
    def _loaded(self, module: nn.Module, prefix: str) -> Iterator[nn.Module]:
        empty = module.state_dict()
        full = {name: self.read(prefix + name).to(self.device, tensor.dtype) for name, tensor in empty.items()}
        module.load_state_dict(full, assign=True)
        del full
        try:
            yield module
        finally:
            module.load_state_dict(empty, assign=True)

    def block_prefix(self, index: int) -> str:
        """Name prefix of the tensors of decoder layer `index`."""
        return f"{self.decoder_name}.layers.{index}."

    @cached_property
    def buffer_names(self) -> frozenset[str]:
        """Full names of what the model holds beside its parameters."""
        return frozenset(name for name, _ in self.skeleton.named_buffers())

    @cached_property
    def linear_weights(self) -> frozenset[str]:
        """Full names of the weights of all linear layers of the decoder that are in a group."""
        names = ((index, name) for index, groups in enumerate(self.groups) for group in groups for name in group.layers)
        return frozenset(f"{self.block_prefix(index)}{name}.weight" for index, name in names)

    @cached_property
    def embedding_names(self) -> tuple[str, ...]:
        """Full names of the embedding and the LM head; of the embedding alone, where the head is tied to it.

        A head of its own in the files counts, whatever config.json says: transformers does the same.
        """
        embedding, head = f"{self.decoder_name}.{EMBEDDING}", f"{HEAD}.weight"
        if not tied_head(self.skeleton):
            return embedding, HEAD
        own = head in self.store and not torch.equal(self.store.get(head), self.store.get(f"{embedding}.weight"))
        return (embedding, HEAD) if own else (embedding,)

    @property
    def head_prefix(self) -> str:
        """Name prefix of the LM head's tensors: its own, or the embedding's where it is tied."""
        return "lm_head." if "lm_head.weight" in self.store else f"{self.decoder_name}.embed_tokens."

    def empty_block(self, index: int) -> Block:
        """Decoder layer `index` without weights: for names and shapes."""
        prefix = self.block_prefix(index)
        return Block(index, prefix, self.decoder.layers[index], self.groups[index], self._kwargs[index])

    @cached_property
    def kinds(self) -> list[tuple[Block, int]]:
        """Decoder layers of the same linear layers as one: an empty block, and the number of such layers."""
        counts = Counter(self.groups)
        return [(self.empty_block(self.groups.index(groups)), count) for groups, count in counts.items()]

    @contextmanager
    def block(self, index: int) -> Iterator[Block]:
        """Decoder layer `index`, with its weights in memory for as long as the context lasts.

        It runs on what the last call of `embed` returned, and on any batch of that sequence length.
        """
        block = self.empty_block(index)
        lazy = {
            name: LinearOnDemand(layer, self.device, functools.partial(self.read, f"{block.prefix}{name}.weight"))
            for group in block.groups
            if group.experts and self.experts_on_demand
            for name, layer in block.linears(group).items()
        }
        with on_demand(block.module, lazy), self._loaded(block.module, block.prefix):
            yield block

    def final_norm(self) -> AbstractContextManager[nn.Module]:
        """The norm behind the last layer, with its weight in memory for as long as the context lasts."""
        return self._loaded(self.decoder.norm, f"{self.decoder_name}.norm.")

    def head(self) -> AbstractContextManager[nn.Module]:
        """The LM head, with its weight in memory for as long as the context lasts; it may be the embedding's."""
        return self._loaded(self.skeleton.lm_head, self.head_prefix)

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
            with self._loaded(self.decoder.embed_tokens, f"{self.decoder_name}.embed_tokens."):
                rows = [self.decoder(input_ids=row[None], use_cache=False)[0] for row in tokens.to(self.device)]
        finally:
            for layer in self.decoder.layers:
                del layer.forward
            self.decoder.norm = norm
        return torch.cat(rows)
