"""Modules that compute with packed weights, in place of those of a transformers model; inference only."""

from __future__ import annotations

import torch
from bq_kernels import ops
from bq_kernels.format import HEAD, QuantConfig
from bq_kernels.prepared import PreparedWeights, prepare_weights, prepared_embedding, prepared_linear
from bq_kernels.reference import angles_of, dense_weight
from torch import nn
from transformers import PreTrainedModel

from .checkpoint import packed_embeddings, quantized_layers
from .errors import UserError
from .skeleton import tied_head


def runs_kernels(device: torch.device) -> bool:
    """Whether the packed product runs as a Triton kernel on `device`; otherwise it is plain torch on stored tensors."""
    return device.type != "cpu" or ops.interpreted()


class PackedModule(nn.Module):
    """A module with the stored tensors of a packed weight [N, K].

    Args:
        config: quantization config of the checkpoint.
        name: full name of the module; its last part selects the rotation block.
        rows: N.
        columns: K.
    """

    def __init__(self, config: QuantConfig, name: str, rows: int, columns: int):
        super().__init__()
        self.columns = columns
        self.kind = config.rotation.kind
        self.block_size = config.rotation.block(name)
        self.zeros = self.angles = self.kept_tokens = self.kept_rows = None
        for suffix, spec in config.tensors(name, columns, rows).items():
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            setattr(self, suffix, nn.Parameter(tensor, requires_grad=False))
        self._prepared_for: torch.device | None = None
        self._weights: PreparedWeights | None = None

    def _stored(self) -> tuple:
        """The weight in the checkpoint's layout: the arguments of `dense_weight` and `prepare_weights`."""
        angles = angles_of(self.kind, self.angles, self.columns, self.block_size, self.qweight.device)
        kept = self.kept_tokens, self.kept_rows
        return self.qweight, self.scales, self.zeros, angles, self.block_size, self.columns, *kept

    def _apply(self, fn, recurse=True):
        """Move the format's tensors, but never round them: `.to(torch.bfloat16)` casts only what is beside them."""
        stored = self.qweight, self.scales, self.zeros, self.angles, self.kept_tokens, self.kept_rows
        exact = {id(tensor) for tensor in stored if tensor is not None}

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            new = fn(tensor)
            return new if id(tensor) not in exact or new.dtype == tensor.dtype else tensor.to(new.device)

        return super()._apply(apply, recurse)

    def prepared(self, device: torch.device) -> PreparedWeights:
        """The weight as it is computed with on `device`; prepared once."""
        if self._prepared_for != device:
            self._weights = prepare_weights(*self._stored(), tiled=runs_kernels(device))
            self._prepared_for = device
        return self._weights

    def dense(self, dtype: torch.dtype) -> nn.Parameter:
        """The dense weight [N, K], the rotation folded in."""
        return nn.Parameter(dense_weight(*self._stored()).to(dtype), requires_grad=False)


class ButterflyLinear(PackedModule):
    """A linear layer that rotates its input and multiplies with packed weights.

    Args:
        config: quantization config of the checkpoint.
        name: full name of the layer.
        linear: the layer that it replaces; its shape and bias are taken over.
    """

    def __init__(self, config: QuantConfig, name: str, linear: nn.Linear):
        super().__init__(config, name, linear.out_features, linear.in_features)
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y = W′ Q x + bias; x [..., in_features] to [..., out_features], same dtype."""
        return prepared_linear(x, self.prepared(x.device), self.bias, self.out_features)

    def to_dense(self, dtype: torch.dtype) -> nn.Linear:
        """The same layer as an `nn.Linear` with a dense weight."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        linear.weight, linear.bias = self.dense(dtype), self.bias
        return linear


class ButterflyEmbedding(PackedModule):
    """An embedding that dequantizes the rows that are looked up.

    Args:
        config: quantization config of the checkpoint.
        name: full name of the embedding.
        embedding: that it replaces; a factor on its output (Gemma) is taken over.

    Raises:
        UserError: if it computes more than rows and a factor.
    """

    def __init__(self, config: QuantConfig, name: str, embedding: nn.Embedding):
        super().__init__(config, name, embedding.num_embeddings, embedding.embedding_dim)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self._replaced, self.factor = (embedding,), getattr(embedding, "scalar_embed_scale", None)
        if type(embedding) is not nn.Embedding and self.factor is None:
            raise UserError(
                f"{name}: a {type(embedding).__name__} cannot be packed; calibrate with --embedding-bits 16"
            )
        # has the dtype of the model's activations, also after `model.to`
        self.register_buffer("_like", torch.empty(0, dtype=embedding.weight.dtype, device="meta"), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the rows."""
        return self._like.dtype

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., embedding_dim] of the tokens `input_ids` [...]."""
        weights = self.prepared(input_ids.device)
        rows = prepared_embedding(input_ids, weights, self.embedding_dim, self.dtype)
        return rows if self.factor is None else rows * torch.tensor(self.factor).to(self.dtype)

    def to_dense(self, dtype: torch.dtype) -> nn.Embedding:
        """The embedding that it replaced, with a dense weight."""
        (embedding,) = self._replaced
        embedding.weight = self.dense(dtype)
        if self.factor is not None:
            embedding.embed_scale = torch.tensor(self.factor, device=embedding.weight.device)
        return embedding


class TiedHead(nn.Module):
    """An LM head that multiplies with the weights of the embedding; there is one copy of them.

    Args:
        embedding: not a submodule of this one, so that its tensors have one name.
        bias: of the head, or None.
    """

    def __init__(self, embedding: ButterflyEmbedding, bias: nn.Parameter | None):
        super().__init__()
        self._embedding, self.bias = (embedding,), bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [..., tokens] of states x [..., features], same dtype."""
        (embedding,) = self._embedding
        return prepared_linear(x, embedding.prepared(x.device), self.bias, embedding.num_embeddings)

    def to_dense(self, weight: nn.Parameter) -> nn.Linear:
        """The head as an `nn.Linear` with the embedding's dense weight."""
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=self.bias is not None)
        linear.weight, linear.bias = weight, self.bias
        return linear


def _refuse_resizing(*_, **__) -> None:
    raise UserError("a packed embedding cannot be resized: dequantize() the model first, or resize the 16-bit model")


def pack(model: PreTrainedModel, config: QuantConfig) -> None:
    """Put packed modules in place of all that a checkpoint of `config` stores packed.

    Raises:
        UserError: if the embedding cannot be packed.
    """
    for name, (linear, _) in quantized_layers(model, config).items():
        model.set_submodule(name, ButterflyLinear(config, name, linear))
    tied = tied_head(model)
    for name, module in packed_embeddings(model, config).items():
        model.resize_token_embeddings = _refuse_resizing
        if isinstance(module, nn.Linear):
            model.set_submodule(name, ButterflyLinear(config, name, module))
            continue
        embedding = ButterflyEmbedding(config, name, module)
        model.set_submodule(name, embedding)
        if tied:
            model.set_submodule(HEAD, TiedHead(embedding, model.get_submodule(HEAD).bias))
            # there is no weight of the head to tie
            model._tied_weights_keys = {k: v for k, v in model._tied_weights_keys.items() if not k.startswith(HEAD)}
            model.all_tied_weights_keys.pop(f"{HEAD}.weight")


def unpack(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Undo `pack`: dense modules, tied where they were."""
    head = model.get_submodule(HEAD)
    for name, module in list(model.named_modules()):
        if isinstance(module, ButterflyLinear | ButterflyEmbedding):
            model.set_submodule(name, module.to_dense(dtype))
    if isinstance(head, TiedHead):
        model.set_submodule(HEAD, head.to_dense(model.get_input_embeddings().weight))
        del model._tied_weights_keys
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    model.__dict__.pop("resize_token_embeddings", None)
