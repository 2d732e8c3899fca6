"""What calibration needs to know of the inputs of linear layers: Hessian, magnitudes, drift, a sample."""

from __future__ import annotations

import torch

from . import parallel
from .sampling import spread_rows

SAMPLE_TOKENS = 1024  # inputs kept for statistics and for the uniformity term
_SAMPLE_PER_BATCH = 64
_PANEL = 512  # rows of a symmetric product that are computed at once


class InputStatistics:
    """Running sums over the inputs x of the layers of one group.

    Args:
        features: K, features of x.
        device: where the sums are kept.
    """

    def __init__(self, features: int, device: torch.device):
        self.tokens = 0
        self._outer = torch.zeros(features, features, device=device)
        self._magnitude = torch.zeros(features, device=device)
        self._drift: torch.Tensor | None = None
        self._rows: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, x16: torch.Tensor | None = None) -> None:
        """Count inputs x [..., K] in, and perhaps the 16-bit model's inputs x16 at the same tokens."""
        x = x.detach().flatten(0, -2).float()
        for start in range(0, x.shape[1], _PANEL):  # the lower triangle; the rest mirrors it
            stop = min(start + _PANEL, x.shape[1])
            self._outer[start:stop, :stop].addmm_(x[:, start:stop].T, x[:, :stop])
        if x16 is not None:
            error = x16.detach().flatten(0, -2).float() - x
            self._drift = torch.zeros_like(self._outer) if self._drift is None else self._drift
            self._drift.addmm_(error.T, x)
        self._magnitude += x.abs().sum(0)
        self._rows.append(spread_rows(x, _SAMPLE_PER_BATCH).clone())
        self.tokens += len(x)

    def add_up(self) -> None:
        """Take the sums over all processes; the sample stays this one's."""
        tokens = torch.tensor(self.tokens, device=self._outer.device)
        sums = tokens, self._outer, self._magnitude, self._drift
        parallel.add_up(value for value in sums if value is not None)
        self.tokens = tokens.item()

    def merge(self, other: InputStatistics) -> None:
        """Count in all that another one has seen."""
        self.tokens += other.tokens
        self._outer += other._outer
        self._magnitude += other._magnitude
        self._rows += other._rows

    def topped_up(self, hessian: torch.Tensor, tokens: float) -> torch.Tensor:
        """The Hessian as if so many more tokens had been seen whose Hessian is `hessian` [K, K]."""
        lower = self._outer.tril().add_(hessian.tril(), alpha=tokens).div_(self.tokens + tokens)
        return lower.add_(lower.tril(-1).T)

    @property
    def hessian(self) -> torch.Tensor:
        """Mean of x xᵀ over tokens, float32 [K, K]: the Hessian of the layer's squared output error, up to a factor."""
        lower = self._outer.tril().div_(self.tokens)
        return lower.add_(lower.tril(-1).T)

    @property
    def drift(self) -> torch.Tensor | None:
        """Mean of (x16 − x) xᵀ, float32 [K, K]: the inputs' error from earlier layers, as far as x tells it."""
        return None if self._drift is None else self._drift / self.tokens

    @property
    def mean_abs(self) -> torch.Tensor:
        """Mean of |x| over tokens, float32 [K]."""
        return self._magnitude / self.tokens

    @property
    def sample(self) -> torch.Tensor:
        """At most SAMPLE_TOKENS of the inputs, float32 [tokens, K]."""
        return spread_rows(torch.cat(self._rows), SAMPLE_TOKENS).clone()
