"""Linear layers: packed weights and angles in, checked against the format, then handed to one of three backends.

`triton` (CUDA, ROCm) multiplies with the packed integers. `dense` (the default elsewhere) folds the rotation back at
load time and serves as fast, and as large, as the 16-bit model. `reference` is plain torch, for comparison.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from types import MethodType

import torch
from bq_kernels import ops, reference
from bq_kernels.format import GROUP_MULTIPLE, PER_CHANNEL, FormatError, QuantConfig, TensorSpec
from bq_kernels.tiles import tile
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
from vllm.platforms import current_platform

from .config import BACKEND_VARIABLE, chosen_backend

BACKENDS = ("triton", "dense", "reference")


def select_backend() -> str:
    """`BQ_VLLM_BACKEND`, or what suits the platform.

    Raises:
        ValueError: if the variable names no backend, or one that cannot run here.
    """
    on_gpu = current_platform.is_cuda_alike()
    backend = chosen_backend() or ("triton" if on_gpu else "dense")
    if backend not in BACKENDS:
        raise ValueError(f"{BACKEND_VARIABLE}={backend}: unknown backend, expected one of {list(BACKENDS)}")
    if backend == "triton" and not on_gpu and not ops.interpreted():
        raise ValueError(f"{BACKEND_VARIABLE}=triton on a CPU needs TRITON_INTERPRET=1")
    return backend


def check_shard(module: str, config: QuantConfig, in_features: int, shard: int) -> None:
    """Refuse a tensor-parallel shard of `shard` input features that would cut a rotation block or a group.

    Raises:
        FormatError: naming the layer, the tensor-parallel size and the largest one that works.
    """
    block = config.rotation.block(module)
    # one group a row means one scale for all columns: any shard of them may keep it
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
    """What the checkpoint must hold for a layer, and what of it has arrived.

    Attributes:
        config: the checkpoint's format.
        modules: for every output partition of the layer, its name in the checkpoint.
        sizes: for every output partition, its rows in the checkpoint (all tensor-parallel ranks together).
        in_features: columns in the checkpoint.
        loaded: (suffix, partition) of what has been loaded.
    """

    config: QuantConfig
    modules: list[str]
    sizes: list[int]
    in_features: int
    loaded: set[tuple[str, int]] = field(default_factory=set)

    def specs(self, partitions: list[int]) -> dict[str, TensorSpec]:
        """Tensors, by suffix, of output partitions that are stored as one."""
        rows = sum(self.sizes[i] for i in partitions)
        return self.config.tensors(self.modules[partitions[0]], self.in_features, rows)


def load_tensor(layer: torch.nn.Module, param: Parameter, loaded_weight: torch.Tensor, shard_id=None) -> None:
    """Weight loader of every stored tensor, bound to its layer: checks it, then shards it.

    It is a bound method and no closure, since vLLM's reloading recognises those and cuts the reference to the layer.

    Raises:
        FormatError: if the tensor is not what the format says.
    """
    tensors, suffix = layer.butterfly, param.suffix
    if shard_id is None:
        partitions = list(range(len(tensors.modules)))  # also what is fused on disk
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
    """The layer's own weight loader, except that it refuses tensors that the layer does not have.

    vLLM passes the fused layer itself for a tensor that it cannot place.
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
        self.dense = UnquantizedLinearMethod() if self.backend == "dense" else None

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
        """Register the stored tensors of this rank, floats as NaN so that one that never arrives is found.

        `qweight` int32 [N, K·bits/32], `scales` and `zeros` float16 [N, K/group], and `angles` float16
        [partitions, K/block, angles a block]: q, k and v each bring a copy, and copies that differ are refused.
        """
        partitions = len(output_partition_sizes)
        ranks = output_size // sum(output_partition_sizes)
        # with more ranks than key/value heads, several ranks hold the same head
        copies = [1, *[getattr(layer, "num_kv_head_replicas", 1)] * (partitions - 1)]
        layer.butterfly = LayerTensors(
            self.config,
            self.modules if len(self.modules) == partitions else self.modules[:1] * partitions,
            [size * ranks // n for size, n in zip(output_partition_sizes, copies, strict=True)],
            input_size,
        )
        layer.packed_rows = sum(output_partition_sizes)
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
            elif suffix == "angles":
                param = BasevLLMParameter(**common)
            elif self.config.group_size == PER_CHANNEL:
                param = ChannelQuantScaleParameter(output_dim=0, **common)
            else:
                param = GroupQuantScaleParameter(input_dim=1, output_dim=0, **common)
            param.suffix = suffix
            layer.register_parameter(suffix, param)

    def _finish_loading(self, layer: torch.nn.Module) -> torch.Tensor | None:
        """Refuse what is missing; returns the layer's angles [K/block, angles a block], None without a rotation."""
        tensors = layer.butterfly
        expected = [(suffix, i) for i in range(len(tensors.modules)) for suffix in tensors.specs([i])]
        if tensors.loaded:
            missing = [tensor for tensor in expected if tensor not in tensors.loaded]
        else:  # dummy weights are finite; NaN is what create_weights left behind
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

    def _dense_weight(self, layer: torch.nn.Module, angles: torch.Tensor | None) -> torch.Tensor:
        packed = layer.qweight.data, layer.scales.data, layer.zeros.data if hasattr(layer, "zeros") else None
        weight = reference.dense_weight(*packed, angles, self.block_size, self._columns(layer))
        return weight.to(layer.params_dtype)

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check what was loaded and bring it into the form of the backend; again after every reload.

        Raises:
            FormatError: if a tensor is missing, or angles that must be the same differ.
        """
        angles = self._finish_loading(layer)
        # Parameters and not attributes or buffers: reloading and sleep mode keep only those up to date
        if self.backend == "dense":
            kept = {"weight": self._dense_weight(layer, angles)}
        else:
            packed = layer.qweight.data, layer.scales.data, layer.zeros.data if hasattr(layer, "zeros") else None
            if self.backend == "triton":
                packed = tile(*packed, self._columns(layer))
            kept = dict(zip(("qweight", "scales", "zeros"), packed, strict=True))
            if angles is not None:
                kept["cos_sin"], kept["mix"] = reference.givens_tables(angles, self.block_size)
        for name in ("qweight", "scales", "zeros", "angles"):
            if hasattr(layer, name):
                delattr(layer, name)
        for name, data in kept.items():
            if data is not None:
                layer.register_parameter(name, Parameter(data, requires_grad=False))
        if self.backend == "dense":
            self.dense.process_weights_after_loading(layer)

    def apply(self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """y = W x + bias for x [..., K] in any supported dtype."""
        if self.backend == "dense":
            return self.dense.apply(layer, x, bias)
        weights = layer.qweight, layer.scales, getattr(layer, "zeros", None)
        tables = (layer.cos_sin, layer.mix) if self.rotates else (None, None)
        if self.backend == "triton":
            return ops.packed_linear(x, *weights, bias, layer.packed_rows, *tables)
        if self.rotates:
            x = reference.apply_rotation(x, *tables)
        return reference.packed_linear(x, *weights, bias)

    def dequantize_weight(self, layer: torch.nn.Module) -> torch.Tensor:
        """The dense weight [N, K] of a layer that has just been loaded: vLLM quantizes it anew on request."""
        return self._dense_weight(layer, self._finish_loading(layer))
