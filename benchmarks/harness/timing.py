"""Time of one call on this device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

REPLAYS, CALLS_PER_GRAPH = 9, 20


def median_seconds(run: Callable[[int], object], sets: int) -> float:
    """Median seconds of one call over replays of a CUDA graph; on a CPU, the mean of one call per set.

    Args:
        run: `run(i)` works on the i-th set of tensors; sets that are together larger than the cache keep it cold.
        sets: how many there are.
    """
    if not torch.cuda.is_available():
        started = time.perf_counter()
        for i in range(sets):
            run(i)
        return (time.perf_counter() - started) / sets
    for i in range(sets):
        run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    calls = max(sets, CALLS_PER_GRAPH)
    with torch.cuda.graph(graph):
        for i in range(calls):
            run(i % sets)
    times = []
    graph.replay()
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)
