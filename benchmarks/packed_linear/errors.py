"""Errors of the packed linear against float64 on the shapes of real models, over formats, dtypes and rows."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bq_kernels import ops, reference
from bq_kernels.format import midrise_zero, num_angles
from bq_kernels.tiles import tile
from rich.table import Table

from benchmarks.packed_linear.measure import MOST_ERROR

# of the output's size; a rotated x and an output that are rounded once each leave half of it
LIMITS = {torch.float16: MOST_ERROR, torch.bfloat16: 8 * MOST_ERROR}


class Format(NamedTuple):
    """A kind of packed weight and rotation.

    Attributes:
        bits: bits per code.
        group: columns that share a scale; None for all columns of a row.
        float_zero: whether groups have a zero of their own.
        block: features per rotation block: `none`, `group` or `full`.
        dtype: of x.
    """

    bits: int
    group: int | None
    float_zero: bool
    block: str
    dtype: torch.dtype


HALF, BRAIN = torch.float16, torch.bfloat16
FORMATS = (  # most important first
    Format(2, 128, False, "group", HALF),
    Format(2, 64, True, "group", HALF),
    Format(2, 128, False, "full", HALF),
    Format(2, 128, False, "none", BRAIN),
    Format(2, 32, False, "group", HALF),
    Format(2, None, False, "none", HALF),
    Format(3, 128, False, "group", HALF),
    Format(4, 128, True, "group", BRAIN),
)


class Layer:
    """A random layer in one format, packed for the kernels and dense in float64.

    Args:
        out_features, in_features: N and K.
        chosen: the format.
        device: where its tensors are.
    """

    def __init__(self, out_features: int, in_features: int, chosen: Format, device: str) -> None:
        self.chosen, self.out_features, self.in_features = chosen, out_features, in_features
        group = chosen.group or in_features
        shape = out_features, in_features // group
        words = torch.randint(-(2**31), 2**31, (out_features, in_features * chosen.bits // 32), device=device)
        words = words.to(torch.int32)
        scales = (torch.rand(shape, device=device) + 0.5).half() / in_features**0.5
        zeros = (
            (midrise_zero(chosen.bits) + torch.rand(shape, device=device) - 0.5).half() if chosen.float_zero else None
        )
        self.packed = tile(words, scales, zeros, in_features)
        self.weight = reference.dequantize(words, scales, zeros, in_features).double()
        self.tables: tuple = (None, None)
        if chosen.block != "none":
            block = group if chosen.block == "group" else in_features
            angles = (torch.rand(in_features // block, num_angles(block), device=device) * 2 - 1) * math.pi
            self.tables = reference.givens_tables(angles, block)

    def errors(self, rows: int) -> dict[str, float]:
        """Errors for random x [rows, K]: root of the mean square and the largest, relative to the output's size."""
        x = torch.randn(rows, self.in_features, device=self.weight.device, dtype=self.chosen.dtype)
        bias = torch.randn(self.out_features, device=self.weight.device, dtype=self.chosen.dtype)
        found = ops.packed_linear(x, *self.packed, bias, self.out_features, *self.tables).double()
        exact = x.double() if self.tables[0] is None else reference.apply_rotation(x.double(), *self.tables)
        wanted = F.linear(exact, self.weight, bias.double())
        size = wanted.square().mean().sqrt()
        difference = (found - wanted) / size
        return {"rms": difference.square().mean().sqrt().item(), "largest": difference.abs().max().item()}


def measure_errors(
    shapes: dict[str, tuple[int, int]], rows: list[int], device: str, deadline: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Errors by format, shape and number of rows, those reached before the deadline.

    Args:
        shapes: out_features and in_features by name.
        rows: numbers of rows of x.
        device: where to compute.
        deadline: by time.monotonic().

    Returns:
        one result per combination, and why others are left out.
    """
    results, left_out = [], {}
    for chosen, (name, shape) in itertools.product(FORMATS, shapes.items()):
        facts = {"layer": name, **chosen._asdict(), "dtype": str(chosen.dtype).removeprefix("torch.")}
        if time.monotonic() > deadline:
            left_out[" ".join(map(str, facts.values()))] = "out of time"
            continue
        layer = Layer(*shape, chosen, device)
        results += [facts | {"rows": count} | layer.errors(count) for count in rows]
    return results, left_out


def exceeding(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results whose error is over the limit of their dtype, or no number."""
    return [row for row in results if not row["rms"] < LIMITS[getattr(torch, row["dtype"])]]


def error_table(results: list[dict[str, Any]]) -> Table:
    """The worst of every format and dtype over shapes and rows."""
    keys = ("bits", "group", "float_zero", "block", "dtype")
    table = Table(*keys, "root mean square", "largest", title="error against float64, relative to the output's size")
    for chosen in dict.fromkeys(tuple(row[key] for key in keys) for row in results):
        mine = [row for row in results if tuple(row[key] for key in keys) == chosen]
        worst = (f"{max(row[name] for row in mine):.2e}" for name in ("rms", "largest"))
        table.add_row(*("row" if part is None else str(part) for part in chosen), *worst)
    return table
