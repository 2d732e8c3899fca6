"""The linears of one decoder layer, one after the other in a CUDA graph, and what each kernel takes of a step.

Two rows have the layer's RMSNorms as well: as kernels of their own, and in the packed linear behind them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table

from benchmarks.harness.timing import median_seconds
from benchmarks.packed_linear.cases import DTYPE, LinearCase
from benchmarks.packed_linear.methods import BASELINE, METHODS, NORMED, ROTATED, Prepared

STEP_METHODS = (BASELINE, ROTATED, "ours, no rotation", "ours, full width", *NORMED)
BEHIND_NORM = ("qkv", "gate_up", "square", "smoke")  # layers that read what an RMSNorm writes
PROFILED_STEPS = 20


def kernel_seconds(step: Callable[[int], object], sets: int) -> dict[str, float]:
    """Seconds per step by the name of a GPU kernel, from a profile of a graph's replays; empty on a CPU."""
    if not torch.cuda.is_available():
        return {}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(sets):
            step(i)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(PROFILED_STEPS):
            graph.replay()
        torch.cuda.synchronize()
    seconds: dict[str, float] = defaultdict(float)
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            seconds[event.name] += event.time_range.elapsed_us() / 1e6 / PROFILED_STEPS / sets
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def measure_step(
    shapes: dict[str, tuple[int, int]], rows: list[int], group: int, device: str, cache: int
) -> list[dict[str, Any]]:
    """Time the linears of a layer in sequence, by method and number of rows.

    Args:
        shapes: out_features and in_features by name, in the order of a forward pass.
        rows: numbers of rows of x.
        group: columns that share a scale.
        device: where to compute.
        cache: bytes of the L2 cache, which the weights of a step must not fit.
    """
    cases = {layer: LinearCase(*shape, group, device, cache) for layer, shape in shapes.items()}
    results = []
    for name in STEP_METHODS:
        normed, plain = NORMED.get(name), METHODS[ROTATED if name in NORMED else name]
        linears: list[Prepared] = [
            (normed if normed and layer in BEHIND_NORM else plain)(case) for layer, case in cases.items()
        ]
        sets = min(linear.sets for linear in linears)
        for count in rows:
            xs = [torch.randn(count, case.in_features, device=device, dtype=DTYPE) for case in cases.values()]

            def step(i, linears=linears, xs=xs):
                for linear, x in zip(linears, xs, strict=True):
                    linear.run(x, i)

            seconds = median_seconds(step, sets)
            results.append({"method": name, "rows": count, "seconds": seconds, "kernels": kernel_seconds(step, sets)})
    return results


def step_table(results: list[dict[str, Any]]) -> Table:
    """Microseconds of a step by method and number of rows, and of the kernels in it."""
    table = Table(
        "rows", "method", "step, µs", "× cuBLAS fp16", "kernels, µs", title="the linears of one decoder layer"
    )
    base = {row["rows"]: row["seconds"] for row in results if row["method"] == BASELINE}
    for row in sorted(results, key=lambda row: row["rows"]):
        kernels = ", ".join(f"{name[:40]} {seconds * 1e6:.1f}" for name, seconds in list(row["kernels"].items())[:4])
        speedup = base[row["rows"]] / row["seconds"]
        table.add_row(str(row["rows"]), row["method"], f"{row['seconds'] * 1e6:.1f}", f"{speedup:.2f}", kernels)
    return table
