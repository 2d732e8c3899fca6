"""Search for the best launch by number of rows, for launch.json."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bq_kernels import reference, triton_linear, triton_mma
from bq_kernels.gpu import Gpu, gpu_of
from bq_kernels.triton_linear import LAUNCH_TABLE, MOST_DECODE_ROWS, Launch
from rich.console import Console

from benchmarks.harness.timing import median_seconds
from benchmarks.packed_linear.cases import DTYPE, LinearCase
from benchmarks.packed_linear.measure import MOST_ERROR

COMMON_FIELDS = ("max_rows", "kernel")
KERNEL_FIELDS = {
    "decode": ("programs", "slice", "fuse"),
    "mma": ("programs", "outputs", "warps", "stages", "exact"),
    "gemm": ("programs", "block_m", "tiles", "stages", "warps"),
    "dense": ("fuse",),
}
# outputs, warps, stages and programs of the decode kernel on mma.sync: the best shapes of the study that it follows and
# those next to them
MMA_SHAPES = (
    (64, 8, 2, 2),
    (64, 16, 2, 1),
    (48, 8, 2, 2),
    (48, 8, 1, 1),
    (32, 8, 2, 1),
    (32, 8, 1, 1),
    (32, 16, 2, 1),
)
MMA_EXACT_SHAPES = ((64, 8, 2, 1), (32, 16, 2, 1))


def candidates(rows: int, gpu: Gpu) -> list[Launch]:
    """Launches worth trying for a number of rows on a GPU."""
    found = []
    if rows <= MOST_DECODE_ROWS:
        if triton_mma.runs_on(gpu):
            for exact, shapes in ((False, MMA_SHAPES), (True, MMA_EXACT_SHAPES)):
                for outputs, warps, stages, programs in shapes:
                    shape = {"outputs": outputs, "warps": warps, "stages": stages, "exact": exact}
                    found.append(Launch(rows, "mma", programs, **shape))
        for columns, programs, fuse in itertools.product((256, 512, 1024), (2, 3, 4, 6), (True, False)):
            found.append(Launch(rows, "decode", programs, columns, fuse))
    if rows >= 8:
        block = max(16, 1 << (rows - 1).bit_length())
        for block_m, tiles, stages, programs in itertools.product((block, block // 2), (1, 2), (3, 4), (1, 2, 4)):
            if 16 <= block_m <= 128:
                warps = 8 if tiles * block_m >= 256 or tiles == 2 else 4
                found.append(Launch(rows, "gemm", programs, block_m=block_m, tiles=tiles, stages=stages, warps=warps))
    if rows >= 128:
        found += [Launch(rows, "dense", fuse=fuse) for fuse in (True, False)]
    return found


def _mean_seconds(launch: Launch, cases: list[LinearCase], tables: list[tuple], xs: list, targets: list) -> float:
    """Geometric mean over layers of a launch's time, with a rotation in blocks of a group.

    Raises:
        ValueError: if a result is not `targets`, the float32 products of the first sets; not checked on a CPU, where
            kernels do not run.
    """
    logarithms = []
    for case, (cos_sin, mix), x, target in zip(cases, tables, xs, targets, strict=True):

        def call(i, x=x, case=case, cos_sin=cos_sin, mix=mix):
            return triton_linear.packed_linear(x, *case.packed[i], None, case.out_features, cos_sin, mix, launch)

        if target is None:
            logarithms.append(math.log(max(median_seconds(lambda i: None, len(case.packed)), 1e-12)))
            continue
        error = ((call(0).float() - target).norm() / target.norm()).item()
        if not error < MOST_ERROR:  # NaN too
            raise ValueError(f"wrong result: relative error {error:.2e}")
        logarithms.append(math.log(median_seconds(call, len(case.packed))))
    return math.exp(sum(logarithms) / len(logarithms))


def _target(x: torch.Tensor, case: LinearCase, tables: tuple) -> torch.Tensor | None:
    """The product of the first set in float32; None on a CPU."""
    return reference.apply_rotation(x, *tables).float() @ case.weight.T if case.device == "cuda" else None


def rank(
    counts: tuple[int, ...], cases: list[LinearCase], deadline: float, console: Console, most: int | None = None
) -> Iterator[Launch]:
    """Yield the best launch by number of rows, those reached before the deadline; prints the best three of each.

    Args:
        counts: numbers of rows.
        cases: layers whose times count alike.
        deadline: by time.monotonic().
        console: where to print.
        most: candidates per number of rows; all by default.
    """
    tables = [case.rotation_tables(case.group_size) for case in cases]
    gpu = gpu_of(cases[0].packed[0][0])
    for rows in counts:
        ranked: list[tuple[float, Launch]] = []
        xs = [torch.randn(rows, case.in_features, device=case.device, dtype=DTYPE) for case in cases]
        targets = [_target(x, case, table) for x, case, table in zip(xs, cases, tables, strict=True)]
        for launch in candidates(rows, gpu)[:most]:
            if time.monotonic() > deadline:
                break
            try:
                ranked.append((_mean_seconds(launch, cases, tables, xs, targets), launch))
            except Exception as problem:  # too many registers, too much shared memory for this GPU, a wrong result
                console.print(f"left out: {launch}: {type(problem).__name__}: {problem}"[:160], markup=False)
        ranked.sort(key=lambda item: item[0])
        for mean, launch in ranked[:3]:
            console.print(f"{rows} rows: {mean * 1e6:.1f} µs {launch}", markup=False)
        if ranked:
            yield ranked[0][1]


def _line(launch: Launch) -> dict[str, Any]:
    """A line of the launch table: the fields that the launch's kernel reads."""
    return {
        name: value for name, value in vars(launch).items() if name in (*COMMON_FIELDS, *KERNEL_FIELDS[launch.kernel])
    }


def write_launch_table(gpu: str, launches: list[Launch], path: Path = LAUNCH_TABLE) -> None:
    """Put the launches of one GPU into the table, one line each.

    Args:
        gpu: its name, as `torch.cuda.get_device_name` gives it.
        launches: fewest rows first.
        path: of the table.
    """
    table = json.loads(path.read_text()) | {gpu: [_line(launch) for launch in launches]}
    entries = (
        f"  {json.dumps(name)}: [\n" + ",\n".join(f"    {json.dumps(line)}" for line in lines) + "\n  ]"
        for name, lines in table.items()
    )
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n")
