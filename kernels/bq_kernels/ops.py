"""Rotation, packed linear and packed embedding as `torch.library` operators; the device selects the implementation.

On CUDA and ROCm tensors the operators run the Triton kernels. On CPU tensors they run the torch reference, unless
TRITON_INTERPRET=1 asks Triton to interpret its kernels on the CPU. Operators are opaque to torch.compile and safe
inside CUDA graphs: no host synchronisation, no allocation that depends on data.
"""

from __future__ import annotations

import os

import torch

from . import reference
from .tiles import grouped_linear as tiled_grouped_linear
from .tiles import norm_linear as tiled_norm_linear
from .tiles import tiled_embedding, tiled_linear

_LAYER = (
    "Tensor tiles, Tensor scales, Tensor? zeros, Tensor? bias, SymInt out_features, Tensor? cos_sin, Tensor? mix, "
    "int activation_bits=16"
)
_LIBRARY = torch.library.Library("bq", "DEF")
_LIBRARY.define("rotate(Tensor x, Tensor cos_sin, Tensor mix) -> Tensor")
_LIBRARY.define(f"packed_linear(Tensor x, {_LAYER}) -> Tensor")
_LIBRARY.define(
    f"norm_linear(Tensor x, Tensor? residual, Tensor norm_weight, float epsilon, {_LAYER}) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "grouped_linear(Tensor x, Tensor experts, Tensor tiles, Tensor scales, Tensor? zeros, SymInt out_features, "
    "Tensor? cos_sin, Tensor? mix) -> Tensor"
)
_LIBRARY.define(
    "packed_embedding(Tensor ids, Tensor tiles, Tensor scales, Tensor? zeros, SymInt in_features, ScalarType dtype, "
    "Tensor? cos_sin, Tensor? mix) -> Tensor"
)


def interpreted() -> bool:
    """Whether Triton kernels run on CPU tensors in this process (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _rotate_triton(x: torch.Tensor, cos_sin: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    from .triton_rotate import apply_rotation  # triton is imported only where its kernels run

    return apply_rotation(x, cos_sin, mix)


def _packed_linear_triton(
    x, tiles, scales, zeros, bias, out_features, cos_sin, mix, activation_bits=16
) -> torch.Tensor:
    from .triton_linear import packed_linear

    layer = (tiles, scales, zeros, bias, out_features, cos_sin, mix)
    return packed_linear(x, *layer, activation_bits=activation_bits)


def _norm_linear_triton(
    x, residual, norm_weight, epsilon, tiles, scales, zeros, bias, out_features, cos_sin, mix, activation_bits=16
) -> tuple[torch.Tensor, torch.Tensor]:
    from .triton_linear import norm_linear

    layer = (tiles, scales, zeros, bias, out_features, cos_sin, mix)
    y, total = norm_linear(x, residual, norm_weight, epsilon, *layer, activation_bits=activation_bits)
    return y, x.new_empty(0) if total is None else total


def _grouped_linear_triton(x, *arguments) -> torch.Tensor:
    if x.is_cuda and x.dtype == torch.float32:  # the matrix units do not take it
        return tiled_grouped_linear(x, *arguments)
    from .triton_grouped import grouped_linear

    return grouped_linear(x, *arguments)


def _packed_embedding_triton(ids, *arguments) -> torch.Tensor:
    from .triton_embedding import packed_embedding

    return packed_embedding(ids, *arguments)


def _interpret(kernel, x: torch.Tensor, *tables) -> torch.Tensor:
    # Triton's interpreter multiplies the bit patterns of bfloat16
    return kernel(x.float() if x.dtype == torch.bfloat16 else x, *tables).to(x.dtype)


def _rotate_cpu(x: torch.Tensor, cos_sin: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    if interpreted():
        return _interpret(_rotate_triton, x, cos_sin, mix)
    return reference.apply_rotation(x, cos_sin, mix)


def _packed_linear_cpu(x, *tensors) -> torch.Tensor:
    if interpreted():
        return _interpret(_packed_linear_triton, x, *tensors)
    return tiled_linear(x, *tensors)


def _norm_linear_cpu(x, *tensors) -> tuple[torch.Tensor, torch.Tensor]:
    if interpreted():
        exact = x.float() if x.dtype == torch.bfloat16 else x  # see _interpret
        return tuple(t.to(x.dtype) for t in _norm_linear_triton(exact, *tensors))
    y, total = tiled_norm_linear(x, *tensors)
    return y, x.new_empty(0) if total is None else total


def _grouped_linear_cpu(x, *arguments) -> torch.Tensor:
    return _interpret(_grouped_linear_triton, x, *arguments) if interpreted() else tiled_grouped_linear(x, *arguments)


def _packed_embedding_cpu(ids, tiles, scales, zeros, in_features, dtype, cos_sin, mix) -> torch.Tensor:
    if interpreted():
        wide = torch.float32 if dtype == torch.bfloat16 else dtype  # as in `_interpret`
        return _packed_embedding_triton(ids, tiles, scales, zeros, in_features, wide, cos_sin, mix).to(dtype)
    return tiled_embedding(ids, tiles, scales, zeros, in_features, dtype, cos_sin, mix)


_LIBRARY.impl("rotate", _rotate_cpu, "CPU")
_LIBRARY.impl("rotate", _rotate_triton, "CUDA")
_LIBRARY.impl("packed_linear", _packed_linear_cpu, "CPU")
_LIBRARY.impl("packed_linear", _packed_linear_triton, "CUDA")
_LIBRARY.impl("norm_linear", _norm_linear_cpu, "CPU")
_LIBRARY.impl("norm_linear", _norm_linear_triton, "CUDA")
_LIBRARY.impl("grouped_linear", _grouped_linear_cpu, "CPU")
_LIBRARY.impl("grouped_linear", _grouped_linear_triton, "CUDA")
_LIBRARY.impl("packed_embedding", _packed_embedding_cpu, "CPU")
_LIBRARY.impl("packed_embedding", _packed_embedding_triton, "CUDA")


@torch.library.register_fake("bq::rotate")
def _(x, cos_sin, mix):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("bq::packed_linear")
def _(x, tiles, scales, zeros, bias, out_features, cos_sin, mix, activation_bits=16):
    return x.new_empty(*x.shape[:-1], out_features)


@torch.library.register_fake("bq::norm_linear")
def _(x, residual, norm_weight, epsilon, tiles, scales, zeros, bias, out_features, *rotation):
    total = x.new_empty(0 if residual is None else x.shape)
    return x.new_empty(*x.shape[:-1], out_features), total


@torch.library.register_fake("bq::grouped_linear")
def _(x, experts, tiles, scales, zeros, out_features, *rotation):
    return x.new_empty(*experts.shape, out_features)


@torch.library.register_fake("bq::packed_embedding")
def _(ids, tiles, scales, zeros, in_features, dtype, cos_sin, mix):
    return ids.new_empty(*ids.shape, in_features, dtype=dtype)


def rotate(x: torch.Tensor, cos_sin: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Q x by the tables of `reference.givens_tables`; arguments as `reference.apply_rotation`. Inference only."""
    return torch.ops.bq.rotate(x, cos_sin, mix)


def packed_linear(
    x: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    cos_sin: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
    activation_bits: int = 16,
) -> torch.Tensor:
    """W′ (Q x) + bias from weights repacked by `tiles.tile`; arguments as `tiles.tiled_linear`. Inference only."""
    return torch.ops.bq.packed_linear(x, tiles, scales, zeros, bias, out_features, cos_sin, mix, activation_bits)


def norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    epsilon: float,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    cos_sin: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
    activation_bits: int = 16,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The packed linear behind an RMSNorm; arguments and results as `tiles.norm_linear`. Inference only."""
    layer = (tiles, scales, zeros, bias, out_features, cos_sin, mix, activation_bits)
    y, total = torch.ops.bq.norm_linear(x, residual, norm_weight, epsilon, *layer)
    return y, None if residual is None else total


def grouped_linear(
    x: torch.Tensor,
    experts: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    out_features: int,
    cos_sin: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
) -> torch.Tensor:
    """W′ₑ (Q x) for the experts e of every row; arguments and result as `tiles.grouped_linear`. Inference only."""
    return torch.ops.bq.grouped_linear(x, experts, tiles, scales, zeros, out_features, cos_sin, mix)


def packed_embedding(
    ids: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    in_features: int,
    dtype: torch.dtype,
    cos_sin: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows of W′ Q from weights repacked by `tiles.tile`; arguments as `tiles.tiled_embedding`. Inference only."""
    return torch.ops.bq.packed_embedding(ids, tiles, scales, zeros, in_features, dtype, cos_sin, mix)
