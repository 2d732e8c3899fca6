"""Rotation and packed linear in plain, differentiable torch: the oracle that every kernel is tested against.

Method: ButterflyQuant (arXiv 2509.09679). y = W x = (W Qᵀ)(Q x) with Q a butterfly of Givens rotations.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .format import BITS, midrise_zero, num_angles, split_block
from .packing import unpack


def hadamard_angles(features: int, block_size: int, device: torch.device | str | None = None) -> torch.Tensor:
    """Angles of the Hadamard transform (up to signs): θ = π/4 in every butterfly layer, φ = 0 across runs.

    Returns:
        float32 [features/block_size, num_angles(block_size)].
    """
    k, _ = split_block(block_size)
    angles = torch.zeros(features // block_size, num_angles(block_size), device=device)
    angles[:, : k * block_size // 2] = math.pi / 4
    return angles


def angles_of(
    kind: str, stored: torch.Tensor | None, features: int, block_size: int, device: torch.device | str | None = None
) -> torch.Tensor | None:
    """Angles of a layer's rotation by its kind: those stored, or those of a Hadamard transform, which are not stored.

    Args:
        kind: `butterfly`, `hadamard` or `none`.
        stored: the layer's `angles`, [features/block_size, num_angles(block_size)], or None.

    Returns:
        `stored`; or float32 of the same shape; or None without rotation.
    """
    return hadamard_angles(features, block_size, device) if kind == "hadamard" else stored


def givens_tables(angles: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles in the form in which a rotation is applied: cosines, sines, and one m×m matrix across the runs.

    Args:
        angles: [B, num_angles(block_size)], any float dtype, one row per block.
        block_size: b = 2ᵏ·m with m odd.

    Returns:
        cos_sin: float32 [B, 2, k, b/2], cosines then sines of every layer, pairs by ascending first index.
        mix: float32 [B, m, m], the product of the rotations across runs (1×1 ones when m = 1).

    Raises:
        ValueError: if `angles` has the wrong number of columns.
    """
    k, m = split_block(block_size)
    if angles.dim() != 2 or angles.shape[1] != num_angles(block_size):
        raise ValueError(
            f"expected angles [blocks, {num_angles(block_size)}] for block size {block_size}, got {list(angles.shape)}"
        )
    angles = angles.float()
    blocks, butterflies = angles.shape[0], k * block_size // 2
    theta = angles[:, :butterflies].reshape(blocks, k, block_size // 2 if k else 0)
    cos_sin = torch.stack((theta.cos(), theta.sin()), dim=1)
    cos, sin = angles[:, butterflies:].cos(), angles[:, butterflies:].sin()
    rows = list(torch.eye(m, device=angles.device).expand(blocks, m, m).unbind(1))
    pair = 0
    for r in range(m):
        for s in range(r + 1, m):
            c, t = cos[:, pair, None], sin[:, pair, None]
            rows[r], rows[s] = c * rows[r] - t * rows[s], t * rows[r] + c * rows[s]
            pair += 1
    return cos_sin, torch.stack(rows, dim=1)


def apply_rotation(x: torch.Tensor, cos_sin: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Rotate features by tables from `givens_tables`; float32 inside, float64 for x in float64.

    Args:
        x: [..., n], any float dtype; n = B·b.
        cos_sin: float32 [B, 2, k, b/2].
        mix: float32 [B, m, m].

    Returns:
        Q x, shape and dtype of `x`.
    """
    blocks, _, k, _ = cos_sin.shape
    m = mix.shape[-1]
    # copied: an operator must not return its argument, not even where Q is the identity (b = 1)
    y = x.reshape(-1, blocks, m << k).to(torch.promote_types(x.dtype, torch.float32), copy=True)
    rows = y.shape[0]
    for j in range(k):
        low, high = y.reshape(rows, blocks, m << (k - 1 - j), 2, 1 << j).unbind(3)
        cos, sin = cos_sin[:, :, j].reshape(blocks, 2, -1, 1 << j).unbind(1)
        y = torch.stack((cos * low - sin * high, sin * low + cos * high), dim=3)
    if m > 1:
        y = torch.einsum("brs,tbsc->tbrc", mix.to(y.dtype), y.reshape(rows, blocks, m, 1 << k))
    return y.reshape(x.shape).to(x.dtype)


def rotate(x: torch.Tensor, angles: torch.Tensor, block_size: int) -> torch.Tensor:
    """Apply a block-diagonal butterfly: every row x of the input becomes Q x. Differentiable in both arguments.

    Args:
        x: [..., n] with n a multiple of `block_size`.
        angles: [n/block_size, num_angles(block_size)].
        block_size: features that mix with each other; n itself is the paper's full-width transform.

    Returns:
        [..., n] in the dtype of `x`.
    """
    return apply_rotation(x, *givens_tables(angles, block_size))


def undo_rotation(x: torch.Tensor, cos_sin: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Inverse of `apply_rotation`: every row x of the input becomes Qᵀ x."""
    blocks, _, k, _ = cos_sin.shape
    m = mix.shape[-1]
    y = x.reshape(-1, blocks, m, 1 << k).float()
    rows = y.shape[0]
    if m > 1:
        y = torch.einsum("bsr,tbsc->tbrc", mix, y)
    for j in reversed(range(k)):
        low, high = y.reshape(rows, blocks, m << (k - 1 - j), 2, 1 << j).unbind(3)
        cos, sin = cos_sin[:, :, j].reshape(blocks, 2, -1, 1 << j).unbind(1)
        y = torch.stack((cos * low + sin * high, cos * high - sin * low), dim=3)
    return y.reshape(x.shape).to(x.dtype)


def unrotate(x: torch.Tensor, angles: torch.Tensor, block_size: int) -> torch.Tensor:
    """Inverse of `rotate`: every row x of the input becomes Qᵀ x. Folds a rotation back into a dense weight."""
    return undo_rotation(x, *givens_tables(angles, block_size))


def rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """RMSNorm (arXiv 1910.07467) of x + residual, with the roundings of vLLM's own; float32 in between.

        t = x + residual,  h = γ · t / √(mean t² + ε)

    Args:
        x: [..., n], any float dtype.
        residual: the same shape, or None.
        weight: γ [n]; t / rms is rounded to its dtype before the product. Gemma's is 1 + the stored one, in float32.
        epsilon: ε.

    Returns:
        h and t, each in the dtype of `x`; t is None without a residual. The mean is that of t before it is rounded.
    """
    total = x.float() if residual is None else x.float() + residual.float()
    h = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + epsilon)
    return (h.to(weight.dtype) * weight).to(x.dtype), None if residual is None else total.to(x.dtype)


def layout_of(qweight: torch.Tensor, scales: torch.Tensor, in_features: int) -> tuple[int, int]:
    """Bits and group size that the shapes of a packed layer imply.

    Raises:
        ValueError: if no supported layout fits the shapes.
    """
    bits, rest = divmod(qweight.shape[-1] * 32, in_features)
    if rest or bits not in BITS or scales.shape[-1] == 0 or in_features % scales.shape[-1]:
        raise ValueError(
            f"qweight {list(qweight.shape)} and scales {list(scales.shape)} do not fit {in_features} input features"
        )
    return bits, in_features // scales.shape[-1]


def zero_point(zeros: torch.Tensor | None, bits: int) -> torch.Tensor | float:
    """z of W′ = s·(q − z), to subtract from codes [..., N, groups, group size].

    Args:
        zeros: stored zero points [..., N, groups], any float dtype; None for mid-rise levels.
        bits: bits per code.

    Returns:
        float32 [..., N, groups, 1], or `midrise_zero(bits)`.
    """
    return midrise_zero(bits) if zeros is None else zeros.float().unsqueeze(-1)


def levels(codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, bits: int) -> torch.Tensor:
    """s·(q − z) in float32 for codes [..., N, groups, group], scales and zeros [..., N, groups]; None: mid-rise."""
    return scales.float().unsqueeze(-1) * (codes - zero_point(zeros, bits))


def dequantize(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, in_features: int
) -> torch.Tensor:
    """W′ = s·(q − z) in float32 [..., N, K]; mid-rise levels where `zeros` is None."""
    bits, group = layout_of(qweight, scales, in_features)
    return levels(unpack(qweight, bits).float().unflatten(-1, (-1, group)), scales, zeros, bits).flatten(-2)


def clamped_swiglu(gate: torch.Tensor, up: torch.Tensor, alpha: float, limit: float) -> torch.Tensor:
    """gate · sigmoid(alpha · gate) · (up + 1) of values within the limit (gpt-oss).

    Args:
        gate: [...].
        up: as `gate`.
        alpha: slope of the sigmoid.
        limit: of `gate` from above, of `up` on both sides.
    """
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def by_expert(
    x: torch.Tensor, experts: torch.Tensor, out_features: int, product: Callable[[torch.Tensor, int], torch.Tensor]
) -> torch.Tensor:
    """Products of the rows of x with the weights of their experts, one expert after the other.

    Args:
        x: [M, K].
        experts: int [M, k], those of every row; -1 for none.
        out_features: N.
        product: gives [rows, N] for rows of x and an expert.

    Returns:
        [M, k, N] in the dtype of `x`, 0 where there is no expert.
    """
    out = x.new_zeros(*experts.shape, out_features)
    for expert in experts[experts >= 0].unique().tolist():
        row, place = (experts == expert).nonzero(as_tuple=True)
        out[row, place] = product(x[row], expert)
    return out


def packed_linear(
    x: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = W′ x + bias with packed weights and input that is already rotated; float32 inside.

    Args:
        x: [..., K], any float dtype.
        qweight: int32 [N, K·bits/32].
        scales: float16 [N, K/group].
        zeros: float16 [N, K/group], or None for mid-rise levels.
        bias: [N] or None.

    Returns:
        [..., N] in the dtype of `x`.
    """
    weight = dequantize(qweight, scales, zeros, x.shape[-1])
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


def packed_embedding(
    ids: torch.Tensor,
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    in_features: int,
    dtype: torch.dtype,
    cos_sin: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows of W = W′ Q, looked up by token; only they are dequantized, and rotated back.

    Args:
        ids: integers [...], rows of the weight.
        qweight: int32 [N, K·bits/32].
        scales: float16 [N, K/group].
        zeros: float16 [N, K/group], or None for mid-rise levels.
        in_features: K.
        dtype: of the result; everything before it is float32.
        cos_sin, mix: tables of Q from `givens_tables`; None without a rotation.

    Returns:
        [..., K] in `dtype`, rounded once.

    Raises:
        IndexError: if an id is not a row.
    """
    rows = [None if stored is None else stored[ids] for stored in (qweight, scales, zeros)]
    weight = dequantize(*rows, in_features)
    return (weight if cos_sin is None else undo_rotation(weight, cos_sin, mix)).to(dtype)


def with_kept_rows(
    rows: torch.Tensor, ids: torch.Tensor, kept_tokens: torch.Tensor | None, kept_rows: torch.Tensor | None
) -> torch.Tensor:
    """Looked-up rows, those that an embedding keeps in 16 bits in place of the packed ones.

    Args:
        rows: [..., K], those of the tokens `ids`.
        ids: integers [...].
        kept_tokens: int64 [R], ascending; None where no rows are kept.
        kept_rows: [R, K], any float dtype; or None.

    Returns:
        [..., K] in the dtype of `rows`; differentiable by the packed rows.
    """
    if kept_tokens is None or not len(kept_tokens):
        return rows
    ids = ids.to(kept_tokens.dtype).contiguous()
    place = torch.searchsorted(kept_tokens, ids).clamp_(max=len(kept_tokens) - 1)
    return torch.where((kept_tokens[place] == ids).unsqueeze(-1), kept_rows[place].to(rows.dtype), rows)


def dense_weight(
    qweight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    angles: torch.Tensor | None,
    block_size: int,
    in_features: int,
    kept_tokens: torch.Tensor | None = None,
    kept_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """W = W′ Q, the float32 [N, K] matrix that acts on unrotated input; `angles` None means no rotation.

    Rows `kept_tokens` [R] of an embedding or LM head are `kept_rows` [R, K]; None where there are none.
    """
    weight = dequantize(qweight, scales, zeros, in_features)
    weight = weight if angles is None else unrotate(weight, angles, block_size)
    return weight if kept_tokens is None else weight.index_copy(0, kept_tokens.long(), kept_rows.to(weight.dtype))
