"""Tables and plot of what kernels.py has measured; all from the record, so that a JSON file is enough."""

from __future__ import annotations

import itertools
import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from rich.table import Table

from benchmarks.packed_linear.methods import BASELINE, METHODS, PEERS, ROTATED

MOST_COLUMNS = 4


def _layers(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["layer"] for row in rows))


def layer_table(rows: list[dict[str, Any]], layer: str) -> Table:
    """Microseconds of one layer by number of rows of x and method."""
    mine = [row for row in rows if row["layer"] == layer]
    methods = [name for name in METHODS if any(name in row["times"] for row in mine)]
    title = f"{layer}, {mine[0]['outputs']} × {mine[0]['inputs']}, µs"
    table = Table("rows", "floor", *methods, "rotation", "copy", title=title)
    for row in mine:
        times = [f"{row['times'][name] * 1e6:.1f}" if name in row["times"] else "" for name in methods]
        rotation = (f"{row['rotation'][name] * 1e6:.1f}" for name in ("block = group", "copy"))
        table.add_row(str(row["rows"]), f"{row['floor'] * 1e6:.1f}", *times, *rotation)
    return table


def _range(values: list[float], digits: int = 2) -> str:
    if not values:
        return ""
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


def comparison_table(rows: list[dict[str, Any]], bandwidth: float) -> Table:
    """The packed linear with a rotation in blocks of a group, relative to the rest; from the least layer to the best.

    Args:
        rows: of a record.
        bandwidth: bytes per second of a copy on the same device.
    """
    others = [name for name in (BASELINE, *PEERS) if any(name in row["times"] for row in rows)]
    speedups = [f"× {name}" for name in others]
    columns = ("rows", *speedups, "share of copy bandwidth", "rotation over copy", "full width adds, µs")
    table = Table(*columns, title=f"{ROTATED}, relative")
    for count in sorted({row["rows"] for row in rows}):
        mine = [row for row in rows if row["rows"] == count and ROTATED in row["times"]]
        cells = [
            _range([row["times"][name] / row["times"][ROTATED] for row in mine if name in row["times"]])
            for name in others
        ]
        cells.append(_range([row["packed_bytes"] / row["times"][ROTATED] / bandwidth for row in mine]))
        cells.append(_range([row["rotation"]["block = group"] / row["rotation"]["copy"] for row in mine]))
        wide = [row["times"] for row in mine if "ours, full width" in row["times"]]
        cells.append(_range([(times["ours, full width"] - times["ours, no rotation"]) * 1e6 for times in wide], 1))
        table.add_row(str(count), *cells)
    return table


def plot(record: dict[str, Any], note: str = "") -> Figure:
    """Microseconds against rows of x, a picture per layer, with the floor; device, versions and a note on top."""
    rows = record["rows"]
    layers = _layers(rows)
    columns = min(len(layers), MOST_COLUMNS)
    lines = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(max(6 * columns, 11), 4.5 * lines + 1), layout="constrained")
    named: dict[str, Any] = {}
    for axis, layer in itertools.zip_longest(figure.subplots(lines, columns, squeeze=False).flat, layers):
        if layer is None:
            axis.remove()
            continue
        mine = [row for row in rows if row["layer"] == layer]
        for i, name in enumerate(METHODS):
            points = [(row["rows"], row["times"][name] * 1e6) for row in mine if name in row["times"]]
            if points:
                style = "o-" if name.startswith("ours") else "s--"
                (named[name],) = axis.loglog(*zip(*points, strict=True), style, color=f"C{i}", markersize=4)
        floors = [row["floor"] * 1e6 for row in mine]
        (named["floor"],) = axis.loglog([row["rows"] for row in mine], floors, "k:")
        axis.set_xscale("log", base=2)
        counts = [row["rows"] for row in mine]
        axis.set_xticks(counts, [str(count) for count in counts], rotation=45)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        title = f"{layer}, {mine[0]['outputs']} × {mine[0]['inputs']}, group {record['group']}"
        axis.set(title=title, xlabel="rows of x", ylabel="µs")
    device, *versions = record["environment"].items()
    known = [f"{name} {version}" for name, version in versions if version != "not installed"]
    figure.suptitle(", ".join([device[1], *known, *filter(None, [note])]))
    figure.legend(named.values(), named.keys(), loc="outside right center")
    return figure
