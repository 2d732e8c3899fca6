"""How rotations are learned in the ablations, and what is changed one at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Setting:
    """How a rotation is learned; defaults are the paper's (arXiv 2509.09679).

    Attributes:
        init: `identity`, `hadamard` or `random`.
        uniformity: weight λ of the uniformity term.
        steps: most steps.
        block_size: features per block; None for the full width.
        optimizer: `adam` or `sgd`.
        lr: learning rate.
        samples: calibration windows; 0 for all.
        objective: `output` or `gptq`.
        matrix: learn an orthogonal matrix by Cayley SGD, not a butterfly; lr and optimizer then do not count.
    """

    init: str = "identity"
    uniformity: float = 0.1
    steps: int = 500
    block_size: int | None = 64
    optimizer: str = "adam"
    lr: float = 0.01
    samples: int = 0
    objective: str = "output"
    matrix: bool = False


_STEPS = {f"{steps} steps": {"steps": steps} for steps in (500, 200, 100, 50, 0)}
_SIZES = {"full width": {"block_size": None}} | {f"blocks of {b}": {"block_size": b} for b in (192, 64, 32, 16)}
_HADAMARD = {"init": "hadamard"}
# by group, the values that one setting takes; the first line of a group sets the goal of the others
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "start": {kind: {"init": kind} for kind in ("identity", "hadamard", "random")},
    "uniformity": {f"λ = {weight}": {"uniformity": weight} for weight in (0.1, 0.0, 1.0)},
    "steps": _STEPS,
    "steps from Hadamard": {name: change | _HADAMARD for name, change in _STEPS.items()},
    "optimiser": {"Adam": {}} | {f"SGD, {lr}": {"optimizer": "sgd", "lr": lr} for lr in (0.1, 1.0, 10.0)},
    "samples": {"all": {}} | {f"{samples} windows": {"samples": samples} for samples in (32, 8, 2)},
    "objective": {
        "output error": {},
        "expected GPTQ error": {"objective": "gptq"},
        "expected GPTQ error, from Hadamard": {"objective": "gptq"} | _HADAMARD,
    },
    "block size": _SIZES,
    "block size from Hadamard": {name: change | _HADAMARD for name, change in _SIZES.items()},
    "any orthogonal matrix": {
        "butterfly, Adam": {"uniformity": 0.0} | _HADAMARD,
        "matrix, Cayley SGD": {"uniformity": 0.0, "matrix": True} | _HADAMARD,
    },
}
