"""The embedding and the LM head in vLLM: packed rows of a vocabulary, which tensor parallelism cuts and vLLM pads."""

from __future__ import annotations

import torch
from bq_kernels.format import ACTIVATION_BITS, KEPT, FormatError, QuantConfig
from bq_kernels.prepared import PreparedWeights, prepared_embedding
from torch.nn import Parameter
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod

from .linear import ButterflyLinearMethod


def _register_placeholder(layer: torch.nn.Module, device: torch.device) -> None:
    """An empty `weight`: vLLM's LoRA layers ask it for the dtype and the device of an embedding and an LM head."""
    data = torch.empty(0, layer.embedding_dim, dtype=layer.params_dtype, device=device)
    layer.register_parameter("weight", Parameter(data, requires_grad=False))


class ButterflyEmbeddingMethod(ButterflyLinearMethod):
    """Packed weights of an embedding, or of an LM head with tensors of its own. Rows of the padding are 0.

    Args:
        config: the checkpoint's format.
        module: name in the checkpoint.
    """

    def __init__(self, config: QuantConfig, module: str) -> None:
        super().__init__(config, [module])
        self.activation_bits = ACTIVATION_BITS[0]  # logits are not worth the rounding
        self.keeps = module in config.kept_tokens
        self.dense = UnquantizedEmbeddingMethod() if self.backend == "dense" else None

    def checkpoint_rows(self, layer: torch.nn.Module, output_partition_sizes: list[int], ranks: int) -> list[int]:
        """Tokens in the checkpoint, without vLLM's padding."""
        return [layer.org_vocab_size]

    def _stored(self, layer: torch.nn.Module, angles: torch.Tensor | None) -> tuple:
        """A layer in the checkpoint's layout; of the rows that are kept, those of this rank, in the model's dtype."""
        stored = super()._stored(layer, angles)
        if not self.keeps:
            return stored
        tokens, rows = layer.kept_tokens.data, layer.kept_rows.data
        first, last = layer.shard_indices.org_vocab_start_index, layer.shard_indices.org_vocab_end_index
        own = (tokens >= first) & (tokens < last)
        return *stored, tokens[own] - first, rows[own].to(layer.params_dtype)

    def prepared(self, layer: torch.nn.Module) -> PreparedWeights:
        """The weights of a layer whose backend is not `dense`."""
        kept = {name: getattr(layer, name) for name in KEPT} if self.keeps else {}
        return super().prepared(layer)._replace(**kept)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check the loaded tensors and bring them into the layout of the backend; again after every reload.

        Raises:
            FormatError: if a tensor is missing.
        """
        super().process_weights_after_loading(layer)
        if self.backend != "dense":
            _register_placeholder(layer, layer.qweight.device)

    def embedding(self, layer: torch.nn.Module, input_: torch.Tensor) -> torch.Tensor:
        """Rows [..., K] of the tokens `input_` [...], in the model's dtype."""
        if self.backend == "dense":
            return self.dense.embedding(layer, input_)
        return prepared_embedding(input_, self.prepared(layer), layer.embedding_dim, layer.params_dtype)

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Refuse an LM head with tensors of its own in a model that ties it.

        Raises:
            FormatError: always.
        """
        raise FormatError(
            f"module_bits: {self.modules[0]} is tied to the embedding; name only the embedding, and store it once"
        )

    def launch(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Launch the layer's kernels as for the tokens x [M, K]: those that are compiled ahead."""
        if not isinstance(layer, ParallelLMHead):
            self.embedding(layer, torch.zeros(len(x), dtype=torch.int64, device=x.device))
        if isinstance(layer, ParallelLMHead) or getattr(layer, "is_tied", False):
            self.apply(layer, x, bias)


class UntiedHeadMethod(UnquantizedEmbeddingMethod):
    """An LM head in 16 bits in a model whose embedding is packed.

    Args:
        module: name of the LM head.
    """

    def __init__(self, module: str) -> None:
        super().__init__()
        self.module = module

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Refuse a model that ties it.

        Raises:
            FormatError: always.
        """
        raise FormatError(f"modules_to_not_convert: {self.module} is tied to the embedding, which is packed")


class TiedHeadMethod(QuantizeMethodBase):
    """An LM head without tensors, which multiplies with those of the packed embedding: there is one copy of them.

    Args:
        module: name of the LM head.
    """

    def __init__(self, module: str) -> None:
        self.module = module

    def create_weights(self, layer: torch.nn.Module, *weight_args, **extra_weight_attrs) -> None:
        """Nothing; the embedding is not known yet."""
        layer.tied_to = ()

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Let the head multiply with the weights of `embed_tokens`."""
        layer.tied_to = (embed_tokens,)  # in a tuple: a submodule would double the embedding's parameters
        embed_tokens.is_tied = True
        return layer

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Refuse a head that the model does not tie.

        Raises:
            FormatError: if nothing has tied it.
        """
        if not layer.tied_to:
            raise FormatError(
                f"{self.module}.weight: missing from the checkpoint, whose embedding is packed, and config.json does "
                f"not tie them; expected {self.module} in module_bits or in modules_to_not_convert"
            )
        _register_placeholder(layer, next(layer.tied_to[0].parameters()).device)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of states x [..., K]."""
        (embedding,) = layer.tied_to
        return embedding.quant_method.apply(embedding, x, bias)
