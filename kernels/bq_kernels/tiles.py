"""Load-time repacking: packed weights in the order in which the threads of a GPU read them.

The checkpoint's rows are cut into tiles of 64 outputs × 128 inputs whose words lie side by side: 128 threads read one
tile with 16-byte loads, and every thread finds in its own words the operands that it feeds to the matrix unit. Where
N or K do not fill the last tile, codes are 0.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .activations import from_int8, rotate_to_int8, rounds_activations
from .format import largest_code
from .packing import pack, unpack
from .reference import apply_rotation, by_expert, layout_of, levels, rms_norm, undo_rotation

TILE_N, TILE_K = 64, 128  # outputs and inputs of a tile
FIELDS = {2: (2,), 3: (2, 1), 4: (4,)}  # widths of the fields in which a code is stored, low bits first
WORDS_PER_BIT = TILE_N * TILE_K // 32  # words of a tile per bit of a code
REPACKED_TILES = 16  # rows of tiles that are repacked together: unpacked codes take 32 times the memory


def _thread_order(codes: torch.Tensor, width: int) -> torch.Tensor:
    """Fields of `width` bits, [N tiles, 64, K tiles, 128], in the order of their bit stream [N tiles, K tiles, 8192].

    Thread (g, t) of a warp feeds rows g and g + 8 of the warp's 16 and, of every 8 columns, 2t and 2t + 1. Those two
    columns go to the same bits of the two halves of a word, so that one AND isolates both operands.
    """
    n_tiles, _, k_tiles, _ = codes.shape
    blocks = max(width // 2, 1)  # 16 bytes of a thread are two rows × two words; wider fields come in several blocks
    # row = (warp, row half, g), column = (block, word, pair, t, side)
    view = codes.reshape(n_tiles, 4, 2, 8, k_tiles, blocks, width // blocks, 16 // width, 4, 2)
    return view.permute(0, 4, 5, 1, 3, 8, 2, 6, 9, 7).reshape(n_tiles, k_tiles, -1)


def tile_weight(qweight: torch.Tensor, bits: int) -> torch.Tensor:
    """Repack the words of a linear layer.

    Args:
        qweight: int32 [N, K·bits/32], the checkpoint's (format.py).
        bits: bits per code.

    Returns:
        int32 [⌈N/64⌉, ⌈K/128⌉, 256·bits].
    """
    parts = []
    for rows in qweight.split(TILE_N * REPACKED_TILES):
        codes = unpack(rows, bits)
        codes = F.pad(codes, (0, -codes.shape[1] % TILE_K, 0, -codes.shape[0] % TILE_N))
        codes = codes.reshape(codes.shape[0] // TILE_N, TILE_N, -1, TILE_K)
        streams, low = [], 0
        for width in FIELDS[bits]:
            field = (codes >> low) & largest_code(width)
            streams.append(pack(_thread_order(field, width), width))
            low += width
        parts.append(torch.cat(streams, dim=-1))
    return torch.cat(parts)


def untile_codes(tiles: torch.Tensor, in_features: int, out_features: int) -> torch.Tensor:
    """Codes uint8 [N, K] of tiles from `tile_weight`."""
    n_tiles, k_tiles, _ = tiles.shape
    widths = FIELDS[tile_bits(tiles)]
    position = torch.arange(TILE_N * TILE_K, device=tiles.device).reshape(1, TILE_N, 1, TILE_K)
    codes = torch.zeros(n_tiles, k_tiles, TILE_N * TILE_K, dtype=torch.uint8, device=tiles.device)
    low = 0
    for width, stream in zip(widths, tiles.split([WORDS_PER_BIT * width for width in widths], dim=-1), strict=True):
        place = _thread_order(position, width).flatten().argsort()
        codes |= unpack(stream, width)[..., place] << low
        low += width
    codes = codes.unflatten(-1, (TILE_N, TILE_K)).transpose(1, 2).reshape(n_tiles * TILE_N, k_tiles * TILE_K)
    return codes[:out_features, :in_features]


def unit_of(group_size: int) -> int:
    """Columns per matrix product: they lie in one tile and in one group, so they share a scale per output."""
    return min(group_size & -group_size, TILE_K)


def tile_bits(tiles: torch.Tensor) -> int:
    """Bits per code of tiles from `tile_weight`."""
    return tiles.shape[-1] // WORDS_PER_BIT


def tile_scales(scales: torch.Tensor) -> torch.Tensor:
    """Scales or zeros [N, K/group] as [K/group, 64·⌈N/64⌉]: the rows of a tile read contiguous memory."""
    return F.pad(scales, (0, 0, 0, -scales.shape[0] % TILE_N)).T.contiguous()


def tile(
    qweight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, in_features: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Repack a layer from the checkpoint's layout to that of the kernels.

    Args:
        qweight: int32 [N, K·bits/32].
        scales: float16 [N, K/group].
        zeros: float16 [N, K/group], or None for mid-rise levels.
        in_features: K.

    Returns:
        int32 [⌈N/64⌉, ⌈K/128⌉, 256·bits], float16 [K/group, 64·⌈N/64⌉], and the same or None.

    Raises:
        ValueError: if no supported layout fits the shapes.
    """
    bits, _ = layout_of(qweight, scales, in_features)
    return tile_weight(qweight, bits), tile_scales(scales), None if zeros is None else tile_scales(zeros)


def dequantize(
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    cos_sin: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
) -> torch.Tensor:
    """W′ = s·(q − z) of a tiled layer, or W′ Q, which acts on inputs that are not rotated.

    Args:
        tiles, scales, zeros: from `tile`.
        in_features, out_features: K and N.
        dtype: of the result; everything before it is float32.
        cos_sin, mix: tables of Q from `reference.givens_tables`; None for W′.

    Returns:
        [N, K] in `dtype`, rounded once.
    """
    codes = untile_codes(tiles, in_features, out_features).unflatten(-1, (scales.shape[0], -1))
    scales, zeros = (None if t is None else t[:, :out_features].T for t in (scales, zeros))
    weight = levels(codes, scales, zeros, tile_bits(tiles)).flatten(-2)
    return (weight if cos_sin is None else undo_rotation(weight, cos_sin, mix)).to(dtype)


def tiled_embedding(
    ids: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    in_features: int,
    dtype: torch.dtype,
    cos_sin: torch.Tensor | None = None,
    mix: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rows of a tiled W′ Q, looked up by token, in plain torch: the kernel is tested against it.

    Args:
        ids: integers [...], rows of the weight.
        tiles, scales, zeros: from `tile`; the rows that fill the last tile are 0.
        in_features: K.
        dtype: of the result; everything before it is float32.
        cos_sin, mix: tables of Q from `reference.givens_tables`; None without a rotation.

    Returns:
        [..., K] in `dtype`, rounded once.

    Raises:
        IndexError: if an id is not a row.
    """
    flat = ids.flatten()
    wanted, tile_of = (flat // TILE_N).unique(return_inverse=True)
    codes = untile_codes(tiles[wanted], in_features, len(wanted) * TILE_N)
    codes = codes[tile_of * TILE_N + flat % TILE_N].unflatten(-1, (scales.shape[0], -1))
    scales, zeros = (None if t is None else t.T[flat] for t in (scales, zeros))
    weight = levels(codes, scales, zeros, tile_bits(tiles)).flatten(-2)
    weight = weight if cos_sin is None else undo_rotation(weight, cos_sin, mix)
    return weight.to(dtype).contiguous().view(*ids.shape, in_features)


def int8_linear(
    x: torch.Tensor,
    x_scales: torch.Tensor,
    tiles: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """y = W′ x + bias for rotated tokens in int8; float32 inside.

    Args:
        x, x_scales: int8 [M, K] and float32 [K/unit, M], from `activations.rotate_to_int8`; the unit is that of
            `unit_of`.
        tiles, scales, zeros: from `tile`.
        bias: [N] or None.
        out_features: N.
        dtype: of the result.

    Returns:
        [M, N] in `dtype`.
    """
    weight = dequantize(tiles, scales, zeros, x.shape[1], out_features, torch.float32)
    return F.linear(from_int8(x, x_scales), weight, None if bias is None else bias.float()).to(dtype)


def tiled_linear(
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
    """y = W′ (Q x) + bias with tiled weights, in plain torch: the kernels are tested against it.

    Args:
        x: [..., K], any float dtype.
        tiles, scales, zeros: from `tile`.
        bias: [N] or None.
        out_features: N.
        cos_sin, mix: tables of Q from `reference.givens_tables`; None where x is already rotated.
        activation_bits: 8: with the tokens of a prefill, Q x is rounded to int8 (`activations.rounds_activations`).

    Returns:
        [..., N] in the dtype of `x`; Q x is rounded to that dtype or to int8 in between, everything else is float32.
    """
    rows = x.reshape(-1, x.shape[-1])
    if rounds_activations(len(rows), activation_bits):
        int8 = rotate_to_int8(rows, cos_sin, mix, unit_of(x.shape[-1] // scales.shape[0]))
        y = int8_linear(*int8, tiles, scales, zeros, bias, out_features, x.dtype)
        return y.view(*x.shape[:-1], out_features)
    if cos_sin is not None:
        x = apply_rotation(x, cos_sin, mix)
    weight = dequantize(tiles, scales, zeros, x.shape[-1], out_features, torch.float32)
    return F.linear(x.float(), weight, None if bias is None else bias.float()).to(x.dtype)


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
    """W′ₑ (Q x) for the experts e of every row of x, in plain torch: the kernel is tested against it.

    Args:
        x: [M, K], any float dtype.
        experts: int [M, k], those of every row; -1 for none.
        tiles, scales, zeros: from `tile`, of all experts: one dimension more in front.
        out_features: N.
        cos_sin, mix: tables of Q, which all experts share; None without a rotation.

    Returns:
        [M, k, N] in the dtype of `x`, 0 where there is no expert.
    """
    x = x if cos_sin is None else apply_rotation(x, cos_sin, mix)

    def product(rows: torch.Tensor, expert: int) -> torch.Tensor:
        own = tiles[expert], scales[expert], None if zeros is None else zeros[expert]
        return tiled_linear(rows, *own, None, out_features)

    return by_expert(x, experts, out_features, product)


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
    """The packed linear behind an RMSNorm: `tiled_linear` of `reference.rms_norm`, which say what the arguments are.

    Returns:
        y [..., N], and the sum of x and the residual, None without one; both in the dtype of `x`.
    """
    h, total = rms_norm(x, residual, norm_weight, epsilon)
    return tiled_linear(h, tiles, scales, zeros, bias, out_features, cos_sin, mix, activation_bits), total
