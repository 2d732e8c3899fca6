"""Statistics for the report: outliers of an input, coherence of a rotation."""

from __future__ import annotations

import torch
from bq_kernels.reference import apply_rotation, givens_tables


def outliers(x: torch.Tensor) -> dict[str, float]:
    """How heavy the tails of activations are, over all entries.

    Args:
        x: [tokens, features].

    Returns:
        `kurtosis` (3 for a Gaussian), `max_over_rms`, `skew`.
    """
    x = x.double()
    centred = x - x.mean()
    variance = centred.square().mean().clamp(min=1e-30)
    return {
        "kurtosis": float(centred.pow(4).mean() / variance.square()),
        "max_over_rms": float(x.abs().max() / x.square().mean().clamp(min=1e-30).sqrt()),
        "skew": float(centred.pow(3).mean() / variance.pow(1.5)),
    }


def coherence(angles: torch.Tensor, block_size: int) -> float:
    """μ = max |Q_ij| over all blocks; 1/√b is the least possible, 1 means some feature is not mixed at all."""
    cos_sin, mix = givens_tables(angles, block_size)
    largest, blocks = 0.0, len(angles)
    rows = max(1, 2**24 // (blocks * block_size))
    for start in range(0, block_size, rows):
        units = torch.eye(block_size, device=angles.device)[start : start + rows]
        columns = apply_rotation(units.repeat(1, blocks), cos_sin, mix)
        largest = max(largest, float(columns.abs().max()))
    return largest
