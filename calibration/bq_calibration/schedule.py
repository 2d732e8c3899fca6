"""The length of a training in tokens, and learning rates over its steps."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from .errors import UserError

SCHEDULES = ("cosine", "wsd")
WARM_UP, DECAY = 0.1, 0.2  # shares of the steps


def parse_tokens(text: str | int) -> int:
    """A number of tokens: 4096, 300k, 30M, 1.5B.

    Raises:
        UserError: for anything else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMB]?)", str(text).strip())
    if not found:
        raise UserError(f"{text}: expected a number of tokens such as 4096, 300k, 30M or 1.5B")
    return round(float(found[1]) * {"": 1, "k": 1e3, "M": 1e6, "B": 1e9}[found[2]])


@dataclass(frozen=True)
class Schedule:
    """The share of its peak that every learning rate has at a step.

    `cosine` falls all the way. `wsd` (warm-up, stable, decay; Hu et al., arXiv 2404.06395) stays at the peak and falls
    in the last fifth by 1 − √ of the way (Hägele et al., arXiv 2405.18392): up to there it does not depend on the
    number of steps, so that a longer training goes on from where the fall began.

    Attributes:
        kind: one of SCHEDULES.
        steps: of the optimizer.
        warm_up: steps in which the rates rise.
    """

    kind: str
    steps: int
    warm_up: float

    @classmethod
    def of(cls, kind: str, steps: int) -> Schedule:
        """With the usual warm-up."""
        return cls(kind, steps, WARM_UP * steps)

    @property
    def decay_from(self) -> int:
        """The first step of the fall."""
        return self.steps - round(DECAY * self.steps) if self.kind == "wsd" else 0

    def factor(self, step: int) -> float:
        """Share of the peak at a step, 0 to 1."""
        rise = min(1.0, (step + 1) / max(1.0, self.warm_up))
        if self.kind == "cosine":
            return rise * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        if step < self.decay_from:
            return rise
        return rise * (1 - math.sqrt((step - self.decay_from) / (self.steps - self.decay_from)))
