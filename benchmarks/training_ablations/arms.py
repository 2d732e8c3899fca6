"""The arms of the comparison: one thing each is other than in the first."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bq_calibration.quantized_linear import INIT_MARGIN

FROZEN, MOVING = {"train_codes": False}, {"train_codes": True}
BLOCKS = {"block_tokens": 61_440}  # each trained on so many first
TOGETHER = BLOCKS | FROZEN | {"tokens_per_step": 512, "schedule": "wsd"}


@dataclass(frozen=True)
class Arm:
    """One training.

    Attributes:
        recipe: settings that differ from the common ones; those of rounding make another start.
        rates: peak learning rates that differ, by kind of parameter.
        loss: one of `losses.LOSSES`.
        gradient: one of `variants.GRADIENTS`.
        freeze: share of the steps after which codes stay.
        average: decay per step of the average of all parameters that is kept in the end; 0 keeps the last.
        margin: how far from its code a latent code may start, in steps of the quantizer.
        embedding: whether the embedding is trained too.
        seeds: further seeds, beside 0.
    """

    recipe: dict[str, Any] = field(default_factory=dict)
    rates: dict[str, float] = field(default_factory=dict)
    loss: str = "kl"
    gradient: str = "straight-through"
    freeze: float = 1.0
    average: float = 0.0
    margin: float = INIT_MARGIN
    embedding: bool = False
    seeds: tuple[int, ...] = ()


def _rates(kind: str, *values: float) -> dict[str, Arm]:
    return {f"{kind} {value:g}": Arm(rates={kind: value}) for value in values}


def _code_rates(*values: float) -> dict[str, Arm]:
    return {f"{value:g}": Arm({"code_lr": value}) for value in values}


# by question; the common settings are `cli.COMMON`
ARMS: dict[str, dict[str, Arm]] = {
    "base": {"codes move": Arm(seeds=(1, 2)), "codes frozen": Arm(FROZEN)},
    "rate of codes": _code_rates(5e-4, 1e-3, 5e-3, 1e-2),
    "other rates": {
        **_rates("scales", 1e-3, 2e-2),
        **_rates("norms", 2e-3),
    },
    "start": {
        "blocks trained": Arm(BLOCKS),
        "blocks trained, codes frozen": Arm(BLOCKS | FROZEN),
        "nearest level": Arm({"rounding": "rtn", "refine": 0}),
    },
    "loss": {
        "KL + CE": Arm(loss="kl+ce"),
        "confidence-weighted KL": Arm(loss="confident"),
        "KL + hidden states": Arm(loss="kl+states"),
    },
    "gradient of rounding": {"DGE, k = 5": Arm(gradient="dge")},
    "end": {
        "codes frozen for the last 30 %": Arm(freeze=0.7),
        "average of weights": Arm(average=0.95),
        "wsd": Arm({"schedule": "wsd"}),
    },
    "tokens per step": {
        "512": Arm({"tokens_per_step": 512}),
        "2048": Arm({"tokens_per_step": 2048}),
    },
    "memory": {"8 bits": Arm({"optimizer_bits": 8})},
    "embedding": {"trained too": Arm(embedding=True)},
    "rotation": {
        "none": Arm({"rotation": "none"}),
        "learned, blocks of 64": Arm({"rotation": "butterfly"}),
    },
    "format": {
        "float zero": Arm({"zero_point": "float"}),
        "2.3 bits": Arm({"target_bpw": 2.3}),
    },
    "columns per scale": {  # at 2.3 bits behind trained blocks: what scales do not take gives more layers 3 bits
        f"{'all' if size == -1 else size}": Arm(TOGETHER | {"group_size": size, "target_bpw": 2.3})
        for size in (64, 192, -1)
    },
    "behind trained blocks": {  # "start, blocks trained, codes frozen" with this changed
        "512 tokens per step, wsd": Arm(TOGETHER),
        "512 tokens per step": Arm(TOGETHER | {"schedule": "cosine"}),
        "512 tokens per step, wsd, scales 0.01": Arm(TOGETHER, rates={"scales": 1e-2}),
        "512 tokens per step, wsd, codes move": Arm(TOGETHER | MOVING),
        "512 tokens per step, wsd, codes move, start within 0.25": Arm(TOGETHER | MOVING, margin=0.25),
    },
}
