"""The levels to which the baselines round: mid-rise as in this project, or min-max as published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import typer
from bq_calibration.quantize import Quantized
from bq_kernels.format import largest_code
from bq_kernels.reference import levels as levels_of
from bq_kernels.reference import zero_point

MIDRISE, MINMAX = "midrise", "minmax"
LevelsOption = Annotated[str, typer.Option("--levels", help="midrise (searched scales) or minmax (as published).")]
_SMALLEST = 1e-7


def straight_through_round(x: torch.Tensor) -> torch.Tensor:
    """Nearest integers; the gradient passes straight through."""
    return x + (x.round() - x).detach()


@dataclass(frozen=True)
class Levels:
    """A grid per group of columns that share a scale.

    Attributes:
        bits: bits per code.
        group_size: columns per group.
        kind: `midrise`, s·(q − (2^bits − 1)/2), or `minmax`, s·(q − z) with an integer zero point z.
    """

    bits: int
    group_size: int
    kind: str = MIDRISE

    def grouped(self, w: torch.Tensor) -> torch.Tensor:
        """A weight [N, K] as [N, groups, group]."""
        return w.unflatten(1, (-1, self.group_size))

    def clipped_range(
        self, w: torch.Tensor, low: torch.Tensor | float, high: torch.Tensor | float
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and integer zero point of every group for shares of its range; differentiable in the shares.

        Args:
            w: float32 [N, groups, group].
            low: share of the smallest weight, [N, groups] or a number; not used by `midrise`.
            high: share of the largest weight, of the largest magnitude with `midrise`.

        Returns:
            scales and zeros [N, groups]; zeros None for mid-rise.
        """
        top = largest_code(self.bits)
        if self.kind == MIDRISE:
            return (high * w.abs().amax(-1) * 2 / top).clamp(min=_SMALLEST), None
        least, most = low * w.amin(-1).clamp(max=0), high * w.amax(-1).clamp(min=0)
        scale = ((most - least) / top).clamp(min=_SMALLEST)
        return scale, straight_through_round(-least / scale)

    def codes(self, w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        """Codes of w [N, groups, group], as floats; gradients pass the rounding."""
        codes = straight_through_round(w / scales.unsqueeze(-1) + zero_point(zeros, self.bits))
        return codes.clamp(0, largest_code(self.bits))

    def rounded(self, w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        """The weight [N, K] on its levels, differentiable; scales and zeros as they are."""
        return levels_of(self.codes(w, scales, zeros), scales, zeros, self.bits).flatten(1)

    def quantized(self, w: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> Quantized:
        """The weight rounded to nearest, with scales and zeros as float16."""
        scales, zeros = scales.half(), None if zeros is None else zeros.half()
        codes = self.codes(w, scales.float(), None if zeros is None else zeros.float())
        return Quantized(codes.flatten(1).to(torch.uint8), scales, zeros, self.bits)
