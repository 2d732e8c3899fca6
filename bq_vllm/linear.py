"""Linear layers in vLLM: load packed weights and angles, check them against the format, prepare them for a backend."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from types import MethodType

import torch
from bq_kernels import ops, reference
from bq_kernels.format import GROUP_MULTIPLE, KEPT, PER_CHANNEL, FormatError, QuantConfig, TensorSpec
from bq_kernels.prepared import PreparedWeights, prepare_weights, prepared_linear
from torch.nn import Parameter
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    GroupQuantScaleParameter,
    PackedvLLMParameter,
)

from . import fuse_norm
from .backend import select_activation_bits, select_backend, select_fuse_norm
from .warming import warm_up


def check_shard(module: str, config: QuantConfig, in_features: int, shard: int) -> None:
    """Refuse a tensor-parallel shard of `shard` input features that would cut a rotation block or a group.

    Raises:
        FormatError: naming the layer, the tensor-parallel size and the largest one that works.
    """
    block = config.rotation.block(module)
    # one group per row is one scale for all columns: every shard of them may keep it
    group = GROUP_MULTIPLE if config.group_size == PER_CHANNEL else config.group_size
    unit = math.lcm(GROUP_MULTIPLE, group, block)
    if shard % unit:
        size, units = in_features // shard, in_features // unit
        largest = max(t for t in range(1, size) if units % t == 0)
        raise FormatError(
            f"{module}: tensor parallel size {size} would cut its {in_features} input features inside a rotation "
            f"block ({block}) or a group ({group}); the largest size below that works for this layer is {largest}"
        )


@dataclass
class LayerTensors:
    """The tensors that the checkpoint must hold for a layer, and those that have been loaded.

    Attributes:
        config: the checkpoint's format.
        modules: name in the checkpoint, per output partition of the layer.
        sizes: out_features in the checkpoint (all tensor-parallel ranks together), per output partition.
        in_features: in_features in the checkpoint.
        loaded: (suffix, partition) of the tensors that have been loaded.
    """

    config: QuantConfig
    modules: list[str]
    sizes: list[int]
    in_features: int
    loaded: set[tuple[str, int]] = field(default_factory=set)

    def specs(self, partitions: list[int]) -> dict[str, TensorSpec]:
        """Tensors, by suffix, of output partitions that the checkpoint stores as one layer."""
        rows = sum(self.sizes[i] for i in partitions)
        return self.config.tensors(self.modules[partitions[0]], self.in_features, rows)


def load_tensor(layer: torch.nn.Module, param: Parameter, loaded_weight: torch.Tensor, shard_id=None) -> None:
    """Weight loader of every stored tensor, bound to its layer: checks the tensor, then shards it.

    It is a bound method and not a closure: vLLM's reloading recognises bound methods and cuts the reference to the
    layer.

    Raises:
        FormatError: if shape, dtype or values of the tensor break the format.
    """
    tensors, suffix = layer.butterfly, param.suffix
    if shard_id is None:
        partitions = list(range(len(tensors.modules)))  # also where the checkpoint stores the layers fused
    elif isinstance(shard_id, str):
        partitions = ["qkv".index(shard_id)]
    else:
        partitions = list(shard_id) if isinstance(shard_id, tuple) else [shard_id]
    tensors.specs(partitions)[suffix].check(f"{tensors.modules[partitions[0]]}.{suffix}", loaded_weight)
    if suffix == "angles":
        blocks = param.shape[1]
        start = param.tp_rank * blocks if loaded_weight.shape[0] > blocks else 0
        for partition in partitions:
            param.data[partition].copy_(loaded_weight.narrow(0, start, blocks))
    else:
        loader = getattr(layer, "weight_loader_v2", layer.weight_loader)
        loader(param, loaded_weight, *(() if shard_id is None else (shard_id,)))
    tensors.loaded.update((suffix, partition) for partition in partitions)


def load_other(layer: torch.nn.Module, param: Parameter | torch.nn.Module, loaded_weight: torch.Tensor, *args) -> None:
    """The layer's own weight loader, which refuses tensors that the layer does not have.

    vLLM passes the fused layer itself for a tensor that it cannot place.

    Raises:
        FormatError: naming the surplus tensor.
    """
    if param is layer:
        raise FormatError(
            f"{' or '.join(layer.butterfly.modules)}: surplus tensor {loaded_weight.dtype} "
            f"{list(loaded_weight.shape)}; expected only {', '.join(layer.butterfly.specs([0]))}"
        )
    type(layer).weight_loader(layer, param, loaded_weight, *args)


@register_weight_loader_v2_supported_method
class ButterflyLinearMethod(LinearMethodBase):
    """Weights of a (possibly fused) linear layer in a rotated basis.

    Args:
        config: the checkpoint's format.
        modules: names of the layers in the checkpoint that it fuses.
    """

    def __init__(self, config: QuantConfig, modules: list[str]) -> None:
        self.config, self.modules, self.bits = config, modules, config.bits_of(modules[0])
        self.rotates, self.block_size = config.rotation.kind != "none", config.rotation.block(modules[0])
        self.backend = select_backend()
        self.activation_bits = select_activation_bits(self.backend, config.prefill_activation_bits)
        self.fuses_norm = select_fuse_norm(self.backend) and self.rotates
        self.dense = UnquantizedLinearMethod() if self.backend == "dense" else None
        self.compiles = self.backend == "triton" and not ops.interpreted()

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        """Register the stored tensors of this rank, floats as NaN so that a tensor that is never loaded is found.

        `qweight` int32 [N, K·bits/32], `scales` and `zeros` float16 [N, K/group], and `angles` float16
        [partitions, K/block, angles per block]: q, k and v each have a copy, and copies that differ are refused.
        """
        partitions = len(output_partition_sizes)
        layer.butterfly = LayerTensors(
            self.config,
            self.modules if len(self.modules) == partitions else self.modules[:1] * partitions,
            self.checkpoint_rows(layer, output_partition_sizes, output_size // sum(output_partition_sizes)),
            input_size,
        )
        layer.packed_out_features = sum(output_partition_sizes)
        layer.weight_loader = MethodType(load_other, layer)
        layer.butterfly.specs(list(range(partitions)))  # refuses groups and blocks that do not divide
        check_shard(self.modules[0], self.config, input_size, input_size_per_partition)

        loader = MethodType(load_tensor, layer)
        shard = self.config.tensors(self.modules[0], input_size_per_partition, sum(output_partition_sizes))
        for suffix, spec in shard.items():
            shape = (partitions, *spec.shape) if suffix == "angles" else spec.shape
            data = torch.full(shape, math.nan if spec.dtype.is_floating_point else 0, dtype=spec.dtype)
            common = {"data": data, "weight_loader": loader}
            if suffix == "qweight":
                packing = {"packed_dim": 1, "packed_factor": Fraction(32, self.bits)}
                param = PackedvLLMParameter(input_dim=1, output_dim=0, **packing, **common)
            elif suffix in ("angles", *KEPT):
                param = BasevLLMParameter(**common)
            elif self.config.group_size == PER_CHANNEL:
                param = ChannelQuantScaleParameter(output_dim=0, **common)
            else:
                param = GroupQuantScaleParameter(input_dim=1, output_dim=0, **common)
            param.suffix = suffix
            layer.register_parameter(suffix, param)
        if self.compiles:
            warm_up.expect(layer)
        if self.fuses_norm:
            fuse_norm.install()

    def checkpoint_rows(self, layer: torch.nn.Module, output_partition_sizes: list[int], ranks: int) -> list[int]:
        """Outputs in the checkpoint, all ranks together, per output partition."""
        # with more ranks than key/value heads, several ranks hold the same head
        copies = [1, *[getattr(layer, "num_kv_head_replicas", 1)] * (len(output_partition_sizes) - 1)]
        return [size * ranks // n for size, n in zip(output_partition_sizes, copies, strict=True)]

    def _finish_loading(self, layer: torch.nn.Module) -> torch.Tensor | None:
        """Refuse missing tensors; returns the layer's angles [K/block, angles per block], None without a rotation."""
        tensors = layer.butterfly
        expected = [(suffix, i) for i in range(len(tensors.modules)) for suffix in tensors.specs([i])]
        if tensors.loaded:
            missing = [tensor for tensor in expected if tensor not in tensors.loaded]
        else:  # dummy weights are finite, unlike the NaN of create_weights
            missing = [] if torch.isfinite(layer.scales).all() else expected
        if missing:
            suffix, i = missing[0]
            spec = tensors.specs([i])[suffix]
            raise FormatError(
                f"{tensors.modules[i]}.{suffix}: missing from the checkpoint; expected {spec.dtype} {list(spec.shape)}"
            )
        stored = None
        if self.config.rotation.kind == "butterfly":
            stored = layer.angles.data[0]
            for module, copy in zip(tensors.modules, layer.angles.data, strict=True):
                if tensors.loaded and not torch.equal(copy, stored):
                    raise FormatError(
                        f"{tensors.modules[0]}.angles and {module}.angles differ, but layers that share an input "
                        "share their rotation"
                    )
        tensors.loaded.clear()
        columns, device = self._columns(layer), layer.qweight.device
        return reference.angles_of(self.config.rotation.kind, stored, columns, self.block_size, device)

    def _columns(self, layer: torch.nn.Module) -> int:
        return layer.qweight.shape[1] * 32 // self.bits

    def _stored(self, layer: torch.nn.Module, angles: torch.Tensor | None) -> tuple:
        """A layer in the checkpoint's layout: the arguments of `dense_weight` and `prepare_weights`."""
        zeros = layer.zeros.data if hasattr(layer, "zeros") else None
        return layer.qweight.data, layer.scales.data, zeros, angles, self.block_size, self._columns(layer)

    def _dense_weight(self, layer: torch.nn.Module, angles: torch.Tensor | None) -> torch.Tensor:
        return reference.dense_weight(*self._stored(layer, angles)).to(layer.params_dtype)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check the loaded tensors and bring them into the layout of the backend; again after every reload.

        Raises:
            FormatError: if a tensor is missing, or angles that must be the same differ.
        """
        angles, in_features = self._finish_loading(layer), self._columns(layer)
        if self.backend == "dense":
            prepared = {"weight": self._dense_weight(layer, angles)}
        else:
            prepared = prepare_weights(*self._stored(layer, angles), tiled=self.backend == "triton")._asdict()
        for name in ("qweight", "scales", "zeros", "angles", *KEPT):
            if hasattr(layer, name):
                delattr(layer, name)
        for name, data in prepared.items():
            if data is not None:
                # Parameters, not attributes or buffers: reloading and sleep mode keep only those up to date
                layer.register_parameter(name, Parameter(data, requires_grad=False))
        if self.backend == "dense":
            self.dense.process_weights_after_loading(layer)
        if self.compiles:
            warm_up.loaded(layer, in_features, self.launch)

    def launch(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Launch the layer's kernels as for the tokens x [M, K]: those that are compiled ahead."""
        self.apply(layer, x, bias)
        if self.fuses_norm and len(self.modules) > 1:  # layers that share an input: a norm may come in front
            qweight, scales, zeros, *tables = self.prepared(layer)[:5]
            packed = (qweight, scales, zeros, bias, layer.packed_out_features, *tables, self.activation_bits)
            for residual in (x, None):
                ops.norm_linear(x, residual, x.new_zeros(x.shape[1]), 0.0, *packed)

    def prepared(self, layer: torch.nn.Module) -> PreparedWeights:
        """The weights of a layer whose backend is not `dense`."""
        tables = (layer.cos_sin, layer.mix) if self.rotates else (None, None)
        return PreparedWeights(layer.qweight, layer.scales, getattr(layer, "zeros", None), *tables)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """y = W x + bias for x [..., K] in any supported dtype."""
        if self.backend == "dense":
            return self.dense.apply(layer, x, bias)
        return prepared_linear(x, self.prepared(layer), bias, layer.packed_out_features, self.activation_bits)

    def dequantize_weight(self, layer: torch.nn.Module) -> torch.Tensor:
        """The dense weight [N, K] of a layer that has just been loaded; vLLM asks for it to quantize it anew."""
        return self._dense_weight(layer, self._finish_loading(layer))
