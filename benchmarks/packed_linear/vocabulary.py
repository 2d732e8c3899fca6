"""Times of an LM head, and of the look-up of an embedding's rows, in few bits beside 16."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.nn.functional as F
from bq_kernels import ops
from bq_kernels.reference import undo_rotation
from rich.table import Table

from benchmarks.harness.timing import median_seconds
from benchmarks.packed_linear.cases import DTYPE, LinearCase
from benchmarks.packed_linear.measure import MOST_ERROR, Ceilings, floor, relative_error
from benchmarks.packed_linear.methods import BASELINE, METHODS, ROTATED

HEAD, LOOK_UP = "LM head", "look-up"
HEAD_METHODS = (BASELINE, "ours, no rotation", ROTATED)
DENSE_ROWS = "F.embedding fp16"


def measure_head(case: LinearCase, rows: int, ceilings: Ceilings) -> dict[str, Any]:
    """Seconds of the product with as many outputs as tokens, by method.

    Raises:
        ValueError: if a result is wrong.
    """
    times, errors = {}, {}
    for name in HEAD_METHODS:
        prepared = METHODS[name](case)
        x = torch.randn(rows, case.in_features, device=case.device, dtype=DTYPE)
        errors[name] = relative_error(prepared, x, case, MOST_ERROR)
        times[name] = median_seconds(lambda i, run=prepared.run, x=x: run(x, i), prepared.sets)
    return {"part": HEAD, "rows": rows, "floor": floor(case, rows, ceilings), "times": times, "errors": errors}


def measure_look_up(case: LinearCase, rows: int, ceilings: Ceilings) -> dict[str, Any]:
    """Seconds of a look-up of random tokens: packed behind a rotation in blocks of a group, and 16-bit rows.

    Raises:
        ValueError: if a result is wrong.
    """
    tables = case.rotation_tables(case.group_size)
    sets = [torch.randint(case.out_features, (rows,), device=case.device) for _ in case.packed]

    def look_up(i: int) -> torch.Tensor:
        return ops.packed_embedding(sets[i], *case.packed[i], case.in_features, DTYPE, *tables)

    want = undo_rotation(case.weight[sets[0]], *tables)
    error = ((look_up(0).float() - want).norm() / want.norm()).item()
    if not error < MOST_ERROR:  # NaN too
        raise ValueError(f"wrong result: relative error {error:.2e}")
    dense = case.dense
    times = {
        DENSE_ROWS: median_seconds(lambda i: F.embedding(sets[i], dense[i]), min(len(sets), len(dense))),
        ROTATED: median_seconds(look_up, len(sets)),
    }
    moved = rows * (case.packed_bytes / case.out_features + case.in_features * DTYPE.itemsize)
    bound = moved / ceilings.bandwidth
    return {"part": LOOK_UP, "rows": rows, "floor": bound, "times": times, "errors": {ROTATED: error}}


def measure_vocabularies(
    shapes: dict[str, tuple[int, int]],
    head_rows: list[int],
    look_up_rows: list[int],
    bits: int,
    group: int,
    device: str,
    ceilings: Ceilings,
    deadline: float,
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Results per model, part and number of rows; and what was left out, with the reason.

    Args:
        shapes: tokens and hidden features by model.
        head_rows: rows of x.
        look_up_rows: tokens that are looked up together.
        bits: per code.
        group: columns that share a scale.
        device: where to compute.
        ceilings: of the device.
        deadline: by time.monotonic().
    """
    results, left_out = [], {}
    for model, shape in shapes.items():
        if time.monotonic() > deadline:
            left_out[model] = "out of time"
            continue
        case = LinearCase(*shape, group, device, ceilings.cache, bits)
        facts = {"model": model, "tokens": shape[0], "features": shape[1]}
        results += [facts | measure_head(case, rows, ceilings) for rows in head_rows]
        results += [facts | measure_look_up(case, rows, ceilings) for rows in look_up_rows]
    return results, left_out


def vocabulary_table(results: list[dict[str, Any]], part: str) -> Table:
    """Microseconds of one part by model and number of rows."""
    mine = [row for row in results if row["part"] == part]
    methods = list(mine[0]["times"]) if mine else []
    table = Table("model", "tokens × features", "rows", "floor", *methods, title=f"{part}, µs")
    for row in mine:
        times = (f"{row['times'][name] * 1e6:.1f}" for name in methods)
        shape = f"{row['tokens']} × {row['features']}"
        table.add_row(row["model"], shape, str(row["rows"]), f"{row['floor'] * 1e6:.1f}", *times)
    return table
