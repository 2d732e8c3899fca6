"""Times of the MLP of a mixture of experts: packed experts in one grouped kernel, beside vLLM's on 16 bits."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bq_kernels import ops, reference
from bq_kernels.tiles import grouped_linear, tile
from rich.table import Table

from benchmarks.harness.timing import median_seconds
from benchmarks.packed_linear.cases import BITS, DTYPE
from benchmarks.packed_linear.measure import MOST_ERROR, Ceilings

OURS, OURS_UNROTATED, PEER = "ours, block = group", "ours, no rotation", "vLLM fp16"
ROUTINGS = 16  # different choices of experts in turn, so that weights are not in the cache


class Mixture(NamedTuple):
    """The experts of one decoder layer: how many, chosen per token, hidden features, features of an expert."""

    experts: int
    chosen: int
    hidden: int
    width: int


MIXTURES = {"qwen3-30b-a3b": Mixture(128, 8, 2048, 768), "mixtral-8x7b": Mixture(8, 2, 4096, 14336)}
SMOKE_MIXTURES = {"smoke": Mixture(5, 2, 128, 192)}


def _packed(count: int, out_features: int, in_features: int, group: int, device: str) -> tuple:
    """Tiles, scales and zeros (None) of random experts."""
    parts = []
    for _ in range(count):
        words = torch.randint(-(2**31), 2**31, (out_features, in_features * BITS // 32), device=device).to(torch.int32)
        scales = (torch.rand(out_features, in_features // group, device=device) + 0.5).half() / in_features**0.5
        parts.append(tile(words, scales, None, in_features)[:2])
    return (*(torch.stack(each) for each in zip(*parts, strict=True)), None)


def _tables(features: int, block: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    return reference.givens_tables(reference.hadamard_angles(features, block, device), block)


def measure_mixture(
    mixture: Mixture, rows: int, group: int, device: str, ceilings: Ceilings
) -> tuple[dict[str, Any], dict[str, str]]:
    """Seconds of gate, up, SiLU, down and the weighted sum, by method; and what was left out, with the reason.

    Raises:
        ValueError: if a result is wrong.
    """
    count, chosen, hidden, width = mixture
    group = min(group, hidden & -hidden, width & -width)
    weights = _packed(count, 2 * width, hidden, group, device), _packed(count, hidden, width, group, device)
    x = torch.randn(rows, hidden, device=device, dtype=DTYPE)
    routings = [torch.rand(rows, count, device=device).argsort(-1)[:, :chosen] for _ in range(ROUTINGS)]
    shares = torch.rand(rows, chosen, device=device).softmax(-1)

    def mlp(product: Callable, numbers: torch.Tensor, tables: tuple) -> torch.Tensor:
        (pair, down), (first, second) = weights, tables
        gate, up = product(x, numbers, *pair, 2 * width, *first).flatten(0, 1).chunk(2, -1)
        found = product(F.silu(gate) * up, numbers.reshape(-1, 1), *down, hidden, *second)
        return (found.view(rows, chosen, hidden) * shares[..., None]).sum(1)

    both = {
        OURS: (_tables(hidden, group, device), _tables(width, group, device)),
        OURS_UNROTATED: ((None, None), (None, None)),
    }
    times, errors, left_out = {}, {}, {}
    for name, tables in both.items():
        want = mlp(grouped_linear, routings[0], tables).float()
        found = mlp(ops.grouped_linear, routings[0], tables).float()
        errors[name] = ((found - want).norm() / want.norm()).item()
        if not errors[name] < MOST_ERROR:  # NaN too
            raise ValueError(f"{name}: wrong result: relative error {errors[name]:.2e}")
        times[name] = median_seconds(lambda i, t=tables: mlp(ops.grouped_linear, routings[i], t), ROUTINGS)
    try:
        times[PEER] = _peer(mixture, x, routings, shares)
    except Exception as problem:  # may be missing, or not take a shape: the table goes on without it
        left_out[PEER] = f"{type(problem).__name__}: {problem}"[:200]
    touched = sum(len(numbers.unique()) for numbers in routings) / ROUTINGS
    matrices = 3 * hidden * width
    moved = touched * matrices * (BITS / 8 + 2 / group)
    bound = max(moved / ceilings.bandwidth, 2 * rows * chosen * matrices / ceilings.operations)
    facts = {"rows": rows, "group": group, "experts_touched": touched, "floor": bound}
    return facts | {"times": times, "errors": errors}, left_out


def _peer(mixture: Mixture, x: torch.Tensor, routings: list[torch.Tensor], shares: torch.Tensor) -> float:
    from vllm.model_executor.layers.fused_moe import fused_experts

    count, _, hidden, width = mixture
    pair = torch.randn(count, 2 * width, hidden, device=x.device, dtype=DTYPE) / hidden**0.5
    down = torch.randn(count, hidden, width, device=x.device, dtype=DTYPE) / width**0.5
    weights = shares.float()
    return median_seconds(lambda i: fused_experts(x, pair, down, weights, routings[i]), len(routings))


def measure_mixtures(
    mixtures: dict[str, Mixture], counts: list[int], group: int, device: str, ceilings: Ceilings, deadline: float
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Results per model and number of rows; and what was left out, with the reason.

    Args:
        mixtures: by model.
        counts: rows of x.
        group: columns that share a scale, where it divides.
        device: where to compute.
        ceilings: of the device.
        deadline: by time.monotonic().
    """
    results, left_out = [], {}
    for model, mixture in mixtures.items():
        for rows in counts:
            if time.monotonic() > deadline:
                left_out[f"{model}, {rows} rows"] = "out of time"
                continue
            found, missing = measure_mixture(mixture, rows, group, device, ceilings)
            results.append({"model": model} | mixture._asdict() | found)
            left_out |= {f"{model}, {name}": reason for name, reason in missing.items()}
    return results, left_out


def mixture_table(results: list[dict[str, Any]]) -> Table:
    """Microseconds by model and number of rows."""
    methods = (OURS, OURS_UNROTATED, PEER)
    table = Table("model", "rows", "experts touched", "floor", *methods, title="MLP of a mixture, µs")
    for row in results:
        times = (f"{row['times'][name] * 1e6:.1f}" if name in row["times"] else "" for name in methods)
        facts = row["model"], str(row["rows"]), f"{row['experts_touched']:.0f}", f"{row['floor'] * 1e6:.1f}"
        table.add_row(*facts, *times)
    return table
