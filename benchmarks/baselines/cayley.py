"""Gradient descent along the orthogonal matrices, for SpinQuant and for the ablations."""

from __future__ import annotations

import math

import torch


@torch.no_grad()
def cayley_step(rotation: torch.Tensor, rate: float) -> None:
    """A step of SGD along the orthogonal matrices (Li et al., arXiv 2002.01113), at most 1/‖A‖ long.

    R ← (I − α/2 A)⁻¹ (I + α/2 A) R with A the skew part of −G Rᵀ; the gradient is then cleared.

    Args:
        rotation: R [n, n] with its gradient G.
        rate: α.
    """
    skew = rotation @ rotation.grad.T
    skew = (skew - skew.T) / 2
    half = min(rate, 1 / (float(torch.linalg.matrix_norm(skew, 1)) + 1e-8)) / 2 * skew
    one = torch.eye(len(rotation), device=rotation.device)
    rotation.copy_(torch.linalg.solve(one - half, (one + half) @ rotation))
    rotation.grad = None


def cosine_rate(peak: float, step: int, steps: int) -> float:
    """The learning rate at a step: half a cosine from `peak` to 0."""
    return peak * 0.5 * (1 + math.cos(math.pi * step / steps))
