"""Experts of a mixture in vLLM: load their packed weights, check them against the format, compute with them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from types import MethodType

import torch
import torch.nn.functional as F
from bq_kernels import reference
from bq_kernels.format import FormatError, QuantConfig
from bq_kernels.prepared import PreparedWeights, prepare_weights, prepared_experts
from torch.nn import Parameter
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from .backend import select_backend
from .linear import check_shard

SHARDS = ("w1", "w3", "w2")  # vLLM's names of an expert's gate, up and down
PAIR, DOWN = "w13", "w2"  # of the parameters that hold gate and up, and down
BIAS = "bias"
GATINGS = {  # by vLLM's names; the constants of the second are vLLM's too, whatever the config says
    "silu": lambda gate, up: F.silu(gate) * up,
    "swigluoai": functools.partial(reference.clamped_swiglu, alpha=1.702, limit=7.0),
}


def activation_of(layer: torch.nn.Module) -> str:
    """vLLM's name of what the experts' gate does with the other."""
    return getattr(layer.activation, "value", layer.activation)


def layer_names(module: str) -> dict[str, str]:
    """By vLLM's names, those of an expert's layers in the checkpoint: the model's own."""
    own = SHARDS if module.endswith("block_sparse_moe.experts") else ("gate_proj", "up_proj", "down_proj")  # Mixtral's
    return dict(zip(SHARDS, own, strict=True))


def load_expert(
    layer: torch.nn.Module,
    param: Parameter,
    loaded_weight: torch.Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """Weight loader of every stored tensor, bound to the experts: checks the tensor, then places this rank's part.

    Raises:
        FormatError: if shape, dtype or values of the tensor break the format, or the rotations of experts differ.
    """
    method, suffix, rank = layer.quant_method, param.suffix, layer.moe_config.tp_rank
    local = layer._map_global_expert_id_to_local_expert_id(expert_id)
    if local == -1:
        return False if return_success else None
    module = f"{method.module}.{expert_id}.{method.names[shard_id]}"
    rows, columns = layer.butterfly_shapes[shard_id]
    name = DOWN if shard_id == "w2" else PAIR
    if suffix == BIAS:
        if loaded_weight.shape != (rows,):
            raise FormatError(f"{module}.{suffix}: expected [{rows}], found {list(loaded_weight.shape)}")
    else:
        method.config.tensors(module, columns, rows)[suffix].check(f"{module}.{suffix}", loaded_weight)
    if suffix == "angles":
        blocks = len(param)
        # vLLM's reload counts copies until a layer is whole, at first into parameters on the meta device: so the angles
        # are copied once, and compared with those that came first
        first = layer.butterfly_angles.setdefault(name, loaded_weight)
        if not torch.equal(first, loaded_weight):
            raise FormatError(f"{module}.angles differs from those of other experts, which share one rotation")
        if first is loaded_weight:
            param.data.copy_(first.narrow(0, rank * blocks if len(first) > blocks else 0, blocks))
    elif suffix == BIAS and shard_id == "w2":  # ranks add up what they compute
        param.data[local].copy_(loaded_weight if rank == 0 else torch.zeros_like(loaded_weight))
    elif shard_id == "w2":  # cut by columns, but for one scale per row
        width = param.shape[2]
        whole = loaded_weight.shape[1] == width
        param.data[local].copy_(loaded_weight if whole else loaded_weight.narrow(1, rank * width, width))
    else:
        height = param.shape[1] // 2
        part = param.data[local].narrow(0, height if shard_id == "w3" else 0, height)
        part.copy_(loaded_weight.narrow(0, rank * height, height))
    layer.butterfly_loaded.add((name, suffix, local, shard_id))
    return True if return_success else None


class StoredExperts:
    """How packed weights of experts are stored and loaded, whatever computes with them.

    Args:
        config: the checkpoint's format.
        module: name of the experts in the checkpoint.
    """

    config: QuantConfig
    module: str

    @property
    def names(self) -> dict[str, str]:
        """See `layer_names`."""
        return layer_names(self.module)

    def create_weights(
        self,
        layer: torch.nn.Module,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs,
    ) -> None:
        """Register the stored tensors of this rank's experts, floats as NaN so that one that is never loaded is found.

        `w13_*` hold gate and up one after the other, `w2_*` down: `qweight` int32 [experts, N, K·bits/32], `scales`
        and `zeros` float16 [experts, N, K/group], `angles` float16 [K/block, angles per block], which all experts
        share, and `bias` [experts, N] of `params_dtype` where experts have one.

        Raises:
            FormatError: if a tensor-parallel shard would cut a rotation block or a group.
        """
        width = intermediate_size_per_partition
        whole = width * layer.moe_config.tp_size
        layer.butterfly_shapes = dict.fromkeys(("w1", "w3"), (whole, hidden_size)) | {"w2": (hidden_size, whole)}
        layer.butterfly_loaded, layer.butterfly_angles = set(), {}
        check_shard(f"{self.module}.0.{self.names['w2']}", self.config, whole, width)
        loader = MethodType(load_expert, layer)
        for name, last, rows, columns in (
            (PAIR, self.names["w1"], 2 * width, hidden_size),
            (DOWN, self.names["w2"], hidden_size, width),
        ):
            for suffix, spec in self.config.tensors(f"{self.module}.0.{last}", columns, rows).items():
                shape = spec.shape if suffix == "angles" else (num_experts, *spec.shape)
                _register(layer, name, suffix, shape, spec.dtype, loader)
            if layer.moe_config.has_bias:
                _register(layer, name, BIAS, (num_experts, rows), params_dtype, loader)

    def load_named(self, layer: torch.nn.Module, expert: int, last: str, suffix: str, tensor: torch.Tensor) -> str:
        """Load a tensor by its name in the checkpoint.

        Args:
            layer: the experts.
            expert: its number.
            last: name of its layer.
            suffix: of the tensor.
            tensor: of the whole expert.

        Returns:
            The name of the parameter that holds it.

        Raises:
            FormatError: as `load_expert`, and if there is no such tensor in the format.
        """
        shard_id = {own: shard for shard, own in self.names.items()}.get(last)
        name = f"{DOWN if shard_id == 'w2' else PAIR}_{suffix}"
        param = getattr(layer, name, None)
        if shard_id is None or param is None:
            raise FormatError(f"{self.module}.{expert}.{last}.{suffix}: no tensor of a packed expert")
        param.weight_loader(param, tensor, name, shard_id, expert)
        return name

    def _suffixes(self, layer: torch.nn.Module, shard_id: str) -> Iterator[tuple[str, str]]:
        """The tensors that a layer of every expert has, and how each is described."""
        rows, columns = layer.butterfly_shapes[shard_id]
        for suffix, spec in self.config.tensors(f"{self.module}.0.{self.names[shard_id]}", columns, rows).items():
            yield suffix, f"{spec.dtype} {list(spec.shape)}"
        if hasattr(layer, f"{DOWN}_{BIAS}"):
            yield BIAS, str([rows])

    def _finish_loading(self, layer: torch.nn.Module) -> None:
        """Refuse missing tensors."""
        layer.butterfly_angles.clear()
        loaded = layer.butterfly_loaded
        # dummy weights are finite, unlike create_weights' NaN
        if not loaded and bool(layer.w13_scales.isfinite().all()):
            return
        for shard_id, last in self.names.items():
            name = DOWN if shard_id == "w2" else PAIR
            for suffix, expected in self._suffixes(layer, shard_id):
                for expert in range(len(layer.w13_qweight)):
                    if (name, suffix, expert, shard_id) not in loaded:
                        raise FormatError(
                            f"{self.module}.{expert}.{last}.{suffix}: missing from the checkpoint; expected {expected}"
                        )
        loaded.clear()

    def _take(self, layer: torch.nn.Module, name: str) -> list[tuple]:
        """The weights of all experts in the checkpoint's layout, the arguments of `dense_weight` and `prepare_weights`;
        their parameters are taken out of the layer.
        """
        last = self.names["w2" if name == DOWN else "w1"]
        kind, block = self.config.rotation.kind, self.config.rotation.block(last)
        stored = {
            suffix: getattr(layer, f"{name}_{suffix}").data
            for suffix in ("qweight", "scales", "zeros", "angles")
            if hasattr(layer, f"{name}_{suffix}")
        }
        for suffix in stored:
            delattr(layer, f"{name}_{suffix}")
        bits = self.config.bits_of(f"{self.module}.0.{last}")
        columns = stored["qweight"].shape[2] * 32 // bits
        angles = reference.angles_of(kind, stored.get("angles"), columns, block, stored["qweight"].device)
        zeros = stored.get("zeros", [None] * len(stored["qweight"]))
        packed = zip(stored["qweight"], stored["scales"], zeros, strict=True)
        return [(*tensors, angles, block, columns) for tensors in packed]


def _register(layer, name: str, suffix: str, shape: tuple[int, ...], dtype: torch.dtype, loader: MethodType) -> None:
    """Register a parameter, floats as NaN."""
    data = torch.full(shape, math.nan if dtype.is_floating_point else 0, dtype=dtype)
    param = Parameter(data, requires_grad=False)
    param.suffix, param.weight_loader = suffix, loader
    layer.register_parameter(f"{name}_{suffix}", param)


def in_turn(pairs: torch.Tensor) -> torch.Tensor:
    """Rows of gates, then of ups [experts, 2·width, …] as vLLM takes them for "swigluoai": in turn."""
    return torch.stack(pairs.chunk(2, 1), 2).flatten(1, 2)


class DenseExpertsMethod(StoredExperts, UnquantizedFusedMoEMethod):
    """Experts as vLLM computes unquantized ones: the rotation is folded into dense weights at load time.

    Args:
        config: the checkpoint's format.
        module: name of the experts in the checkpoint.
        moe: vLLM's description of them.
    """

    def __init__(self, config: QuantConfig, module: str, moe: FusedMoEConfig) -> None:
        UnquantizedFusedMoEMethod.__init__(self, moe)
        self.config, self.module = config, module

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check the loaded tensors and make dense weights of them.

        Raises:
            FormatError: if a tensor is missing.
        """
        self._finish_loading(layer)
        for name in (PAIR, DOWN):
            dense = [reference.dense_weight(*stored).to(layer.params_dtype) for stored in self._take(layer, name)]
            layer.register_parameter(f"{name}_weight", Parameter(torch.stack(dense), requires_grad=False))
        if activation_of(layer) == "swigluoai":
            for param in (layer.w13_weight, layer.w13_bias):
                param.data = in_turn(param.data)
        if current_platform.is_cpu():
            self.moe_kernel = None  # vLLM packs weights for its CPU kernel only as long as there is none
        UnquantizedFusedMoEMethod.process_weights_after_loading(self, layer)


class PackedExpertsMethod(StoredExperts, FusedMoEMethodBase):
    """Experts with packed weights: `triton` in one kernel for all, `reference` one after the other in plain torch.

    Args:
        config: the checkpoint's format.
        module: name of the experts in the checkpoint.
        moe: vLLM's description of them.
        backend: `triton` or `reference`.

    Raises:
        FormatError: if vLLM would put adapters beside the experts.
    """

    def __init__(self, config: QuantConfig, module: str, moe: FusedMoEConfig, backend: str) -> None:
        FusedMoEMethodBase.__init__(self, moe)
        engine = get_current_vllm_config_or_none()
        if engine and engine.lora_config and engine.lora_config.target_modules is None:
            raise FormatError(
                f"{module}: packed experts take no LoRA adapters; name the layers that may have some: "
                "--lora-target-modules qkv_proj o_proj"
            )
        self.config, self.module, self.backend = config, module, backend

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Check the loaded tensors and bring them into the layout of the backend.

        Raises:
            FormatError: if a tensor is missing, or for experts that vLLM computes otherwise.
        """
        if activation_of(layer) not in GATINGS or layer.apply_router_weight_on_input:
            known = ", ".join(GATINGS)
            raise FormatError(f"{self.module}: packed experts know only {known}, and the router's weights on outputs")
        self._finish_loading(layer)
        for name in (PAIR, DOWN):
            prepared = [prepare_weights(*stored, tiled=self.backend == "triton") for stored in self._take(layer, name)]
            for suffix, data in prepared[0]._asdict().items():
                if data is None:
                    continue
                shared = suffix in ("cos_sin", "mix")  # one rotation for all
                data = data if shared else torch.stack([getattr(each, suffix) for each in prepared])
                layer.register_parameter(f"{name}_{suffix}", Parameter(data, requires_grad=False))

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> FusedMoEQuantConfig | None:
        """Nothing that vLLM's own kernels would need."""
        return FusedMoEQuantConfig.make()

    def _product(self, layer: torch.nn.Module, name: str, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """What the layers `name` of its experts [M, k] make of x [M, K]: [M, k, N], 0 where there is none (-1)."""
        rows = layer.butterfly_shapes["w2"][0] if name == DOWN else 2 * layer.intermediate_size_per_partition
        weights = PreparedWeights(*(getattr(layer, f"{name}_{suffix}", None) for suffix in PreparedWeights._fields))
        found, bias = prepared_experts(x, experts, weights, rows), getattr(layer, f"{name}_{BIAS}", None)
        return found if bias is None else found + bias[experts].masked_fill(experts[..., None] < 0, 0)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, *_, **__
    ) -> torch.Tensor:
        """Sum over a token's experts of their outputs, weighted; x [tokens, hidden] to the same."""
        # of several ranks each has some of the experts: -1 in vLLM's map stands for one of another rank
        experts = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        gate, up = self._product(layer, PAIR, x, experts).flatten(0, 1).chunk(2, -1)
        found = self._product(layer, DOWN, GATINGS[activation_of(layer)](gate, up), experts.reshape(-1, 1))
        return (found.view(*experts.shape, -1) * topk_weights[..., None]).sum(1).to(x.dtype)


def experts_method(config: QuantConfig, module: str, moe: FusedMoEConfig) -> FusedMoEMethodBase:
    """The method of the experts `module` for the backend that is selected."""
    backend = select_backend()
    if backend == "dense":
        return DenseExpertsMethod(config, module, moe)
    return PackedExpertsMethod(config, module, moe, backend)
