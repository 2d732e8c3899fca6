"""Table and plot of the accuracy benchmark."""

from __future__ import annotations

import math
import re
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from rich.table import Table

MOST_TIMES = 20  # times the perplexity of 16 bits: rows above stand at this edge of the plot
MARKERS = "osD"  # one per ten colours
BUTTERFLY_MARKER = "^"


def mean_accuracy(tasks: dict[str, dict[str, float]]) -> tuple[float, float]:
    """Mean over tasks and its standard error."""
    errors = math.sqrt(sum(task["stderr"] ** 2 for task in tasks.values()))
    return sum(task["value"] for task in tasks.values()) / len(tasks), errors / len(tasks)


def table_of(full: dict[str, Any], rows: list[dict[str, Any]]) -> Table:
    """The table, the 16-bit model first."""
    table = Table("method", "bits per weight")
    for dataset in full["perplexity"]:
        table.add_column(f"perplexity {dataset}")
        table.add_column("× 16-bit")
    for task in full["tasks"]:
        table.add_column(task)
    if full["tasks"]:
        table.add_column("mean")
    for name in ("calibration tokens", "calibration, s", "peak memory, GB"):
        table.add_column(name)
    for row in [full, *rows]:
        cells = [row["method"], f"{row.get('bits_per_weight', 16):.3f}"]
        for dataset, found in row["perplexity"].items():
            spread = f" ± {found['spread']:.2f}" if "spread" in found else ""
            times = found["value"] / full["perplexity"][dataset]["value"]
            cells += [f"{found['value']:,.2f}{spread}", f"{times:,.2f}"]
        cells += [f"{task['value']:.4f} ± {task['stderr']:.4f}" for task in row["tasks"].values()]
        cells += ["{:.4f} ± {:.4f}".format(*mean_accuracy(row["tasks"]))] if row["tasks"] else []
        if made := row.get("run"):
            seconds = f"{made['wall_seconds']:.0f}" + (" (resumed)" if made["resumed"] else "")
            cells += [f"{row['calibration_tokens']}", seconds, f"{made['peak_memory_bytes'] / 1e9:.2f}"]
        table.add_row(*cells)
    return table


def _calibration_seconds(row: dict[str, Any]) -> float | None:
    # the time of a resumed run may be that of its last part only
    return None if row["run"]["resumed"] else row["run"]["wall_seconds"]


MEASURES = {"bits per weight, all counted": lambda row: row["bits_per_weight"], "calibration, s": _calibration_seconds}


def _draw(axis: Axes, rows: list[dict[str, Any]], dataset: str, measure: str, base: float, named: dict) -> None:
    """Points of all rows: perplexity against one measure; `named` collects one of them per name in the legend."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for row in rows:
        place, value = MEASURES[measure](row), row["perplexity"][dataset]["value"]
        if place is None:
            continue
        method = row["method"]
        i = methods.index(method)
        marker = BUTTERFLY_MARKER if method.startswith("butterfly") else MARKERS[i // 10]
        fill = f"C{i}" if value <= MOST_TIMES * base else "none"
        (point,) = axis.plot(place, min(value, MOST_TIMES * base), marker, color=f"C{i}", mfc=fill, linestyle="")
        named.setdefault(re.split(r" \(|:", method)[0], point)
    named["16-bit"] = axis.axhline(base, color="k", linestyle="--")
    axis.set(xlabel=measure, ylabel=f"perplexity, {dataset}", yscale="log")


def plot(full: dict[str, Any], rows: list[dict[str, Any]]) -> Figure:
    """Perplexity against bits per weight and against calibration time, a line of pictures per data set."""
    datasets = list(full["perplexity"])
    figure, named = Figure(figsize=(14, 4 * len(datasets)), layout="constrained"), {}
    axes = figure.subplots(len(datasets), len(MEASURES), squeeze=False)
    for line, dataset in zip(axes, datasets, strict=True):
        for axis, measure in zip(line, MEASURES, strict=True):
            _draw(axis, rows, dataset, measure, full["perplexity"][dataset]["value"], named)
        line[1].set_xscale("log")
        for scale in (line[0].yaxis, line[1].yaxis, line[1].xaxis):
            scale.set_major_locator(LogLocator(subs=(1, 2, 5)))
            scale.set_major_formatter("{x:,.0f}")
            scale.set_minor_formatter("")
    title = f"open, at the upper edge:\n{MOST_TIMES} × 16-bit and more"
    figure.legend(named.values(), named.keys(), loc="outside right upper", fontsize=9, title=title)
    return figure
