"""Weights of a packed layer, prepared once after loading; the product with them, and the look-up of their rows.

transformers and vLLM both load layers in the checkpoint's layout and compute through this file. One layout serves both:
an embedding that is tied to the LM head is in memory once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from . import ops, reference
from .activations import from_int8, rotate_to_int8, rounds_activations
from .tiles import tile, unit_of


class PreparedWeights(NamedTuple):
    """Tensors of one linear layer, embedding or LM head; None where it has none.

    Attributes:
        qweight: int32, tiles [⌈N/64⌉, ⌈K/128⌉, 256·bits] or the checkpoint's words [N, K·bits/32].
        scales, zeros: [K/group, 64·⌈N/64⌉] beside tiles, else [N, K/group]; `zeros` None: mid-rise levels.
        cos_sin, mix: tables of the rotation, from `reference.givens_tables`; None without a rotation.
        kept_tokens, kept_rows: int64 [R] in ascending order, and [R, K] in any float dtype: rows of W′ Q that stand in
            place of the packed ones; None without.
    """

    qweight: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    cos_sin: torch.Tensor | None
    mix: torch.Tensor | None
    kept_tokens: torch.Tensor | None = None
    kept_rows: torch.Tensor | None = None


def prepare_weights(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    angles: torch.Tensor | None,
    block_size: int,
    in_features: int,
    kept_tokens: torch.Tensor | None = None,
    kept_rows: torch.Tensor | None = None,
    *,
    tiled: bool,
) -> PreparedWeights:
    """Bring a layer from the checkpoint's layout into the one that it is multiplied in.

    Args:
        qweight: int32 [N, K·bits/32].
        scales: [N, K/group].
        zeros: [N, K/group], or None for mid-rise levels.
        angles: [K/block_size, num_angles(block_size)], or None without a rotation.
        block_size: block size of the rotation.
        in_features: K.
        kept_tokens: int [R], rows of an embedding or LM head that are kept in 16 bits; or None.
        kept_rows: [R, K], those rows.
        tiled: repack for the operators of `ops`; otherwise keep the words as they are, for plain torch.

    Raises:
        ValueError: if no supported layout fits the shapes.
    """
    packed = tile(qweight, scales, zeros, in_features) if tiled else (qweight, scales, zeros)
    tables = (None, None) if angles is None else reference.givens_tables(angles, block_size)
    return PreparedWeights(*packed, *tables, None if kept_tokens is None else kept_tokens.long(), kept_rows)


def prepared_linear(
    x: torch.Tensor,
    weights: PreparedWeights,
    bias: torch.Tensor | None,
    out_features: int,
    activation_bits: int = 16,
) -> torch.Tensor:
    """y = W′ (Q x) + bias: an operator of `ops` for tiles, else plain torch.

    Args:
        x: [..., K], any float dtype.
        weights: from `prepare_weights`.
        bias: [N] or None.
        out_features: N.
        activation_bits: 8: with the tokens of a prefill, Q x is rounded to int8 (`activations.rounds_activations`).

    Returns:
        [..., N] in the dtype of `x`.
    """
    y = _packed_linear(x, weights, bias, out_features, activation_bits)
    if weights.kept_tokens is not None:
        own_bias = None if bias is None else bias[weights.kept_tokens]
        y.index_copy_(-1, weights.kept_tokens, F.linear(x, weights.kept_rows.to(x.dtype), own_bias))
    return y


def _packed_linear(
    x: torch.Tensor, weights: PreparedWeights, bias: torch.Tensor | None, out_features: int, activation_bits: int
) -> torch.Tensor:
    """`prepared_linear` without the rows that are kept."""
    qweight, scales, zeros, cos_sin, mix, *_ = weights
    if qweight.dim() == 3:
        return ops.packed_linear(x, qweight, scales, zeros, bias, out_features, cos_sin, mix, activation_bits)
    rows = x.reshape(-1, x.shape[-1])
    if rounds_activations(len(rows), activation_bits):
        int8 = rotate_to_int8(rows, cos_sin, mix, unit_of(x.shape[-1] // scales.shape[1]))
        y = reference.packed_linear(from_int8(*int8), qweight, scales, zeros, bias)
        return y.to(x.dtype).view(*x.shape[:-1], out_features)
    if cos_sin is not None:
        x = reference.apply_rotation(x, cos_sin, mix)
    return reference.packed_linear(x, qweight, scales, zeros, bias)


def prepared_experts(
    x: torch.Tensor, experts: torch.Tensor, weights: PreparedWeights, out_features: int
) -> torch.Tensor:
    """W′ₑ (Q x) for the experts e of every row: an operator of `ops` for tiles, else plain torch.

    Args:
        x: [M, K], any float dtype.
        experts: int [M, k], those of every row; -1 for none.
        weights: from `prepare_weights`, of all experts: one dimension more in front, but for the tables they share.
        out_features: N.

    Returns:
        [M, k, N] in the dtype of `x`, 0 where there is no expert.
    """
    qweight, scales, zeros, cos_sin, mix, *_ = weights
    if qweight.dim() == 4:
        return ops.grouped_linear(x, experts, qweight, scales, zeros, out_features, cos_sin, mix)

    def product(rows: torch.Tensor, expert: int) -> torch.Tensor:
        own = qweight[expert], scales[expert], None if zeros is None else zeros[expert]
        return prepared_linear(rows, PreparedWeights(*own, cos_sin, mix), None, out_features)

    return reference.by_expert(x, experts, out_features, product)


def prepared_embedding(
    ids: torch.Tensor, weights: PreparedWeights, in_features: int, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of W′ Q, looked up by token: an operator of `ops` for tiles, else plain torch.

    Args:
        ids: integers [...], rows of the weight.
        weights: from `prepare_weights`.
        in_features: K.
        dtype: of the result.

    Returns:
        [..., K] in `dtype`.
    """
    look_up = ops.packed_embedding if weights.qweight.dim() == 3 else reference.packed_embedding
    qweight, scales, zeros, cos_sin, mix, kept_tokens, kept_rows = weights
    rows = look_up(ids, qweight, scales, zeros, in_features, dtype, cos_sin, mix)
    return reference.with_kept_rows(rows, ids, kept_tokens, kept_rows)
