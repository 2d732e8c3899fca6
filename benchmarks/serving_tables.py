"""Tables and plot of what serving.py has measured."""

from __future__ import annotations

import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table
from serving_engine import CATEGORIES, Settings, Task

console = Console(width=180)


def rate(row: dict, task: Task, settings: Settings) -> list[float]:
    """Generated tokens a second of every run of a latency or throughput task; empty if it was not measured."""
    kind, count = task
    tokens = count * (settings.latency if kind == "latency" else settings.load)[1]
    return [tokens / seconds for seconds in row.get(kind, {}).get(str(count), [])]


def _cell(values: list[float], base: list[float]) -> str:
    if not values:
        return ""
    median = statistics.median(values)
    ratio = f", {median / statistics.median(base):.2f}×" if base else ""
    return f"{median:,.0f} ±{(max(values) - min(values)) / 2 / median:.0%}{ratio}"


def measured(rows: dict[str, dict], *kinds: str) -> list[Task]:
    """Tasks of some kinds that a row has a result of."""
    return [(kind, n) for kind in kinds for n in sorted({int(n) for row in rows.values() for n in row.get(kind, {})})]


def print_tables(rows: dict[str, dict], settings: Settings) -> None:
    """Print speeds (tokens a second: median, half the range, ratio to fp16), serving figures and profiles."""
    base = rows.get("fp16", {})
    speeds = measured(rows, "latency", "throughput")
    titles = [f"batch {count}" if kind == "latency" else kind for kind, count in speeds]
    table = Table("row", "weights, GiB", "room for KV, tokens", *titles, title="tokens/s")
    for name, row in rows.items():
        cells = (_cell(rate(row, task, settings), rate(base, task, settings)) for task in speeds)
        weights, room = row.get("loading_gib", row.get("weights_gib")), row.get("kv_tokens")
        table.add_row(name, f"{weights:.3f}" if weights else "", f"{room:,.0f}" if room else "", *cells)
    console.print(table)
    for name, row in rows.items():
        if "kernel" in row:
            console.print(f"{name}: {row['kernel']}")

    columns = ("TTFT, ms", "TPOT, ms", "tokens/s")
    table = Table("clients", "row", *columns, title="serving: median ± half the range, × fp16")
    for kind, count in measured(rows, "serve"):
        for name, row in rows.items():
            mine, other = (r.get(kind, {}).get(str(count), []) for r in (row, base))
            keys = ("median_ttft_ms", "median_tpot_ms", "output_throughput")
            if mine:
                cells = (_cell([run[key] for run in mine], [run[key] for run in other]) for key in keys)
                table.add_row(str(count), name, *cells)
    if table.row_count:
        console.print(table)

    table = Table("batch", "row", *CATEGORIES, "other", "gaps", "step", title="a decode step, µs")
    for name, row in rows.items():
        for count, parts in row.get("profile", {}).items():
            cells = (f"{parts[key]:.0f} ({parts[key] / parts['step']:.0%})" for key in list(parts)[:-1])
            table.add_row(count, name, *cells, f"{parts['step']:.0f}")
    if table.row_count:
        console.print(table)


def _spread(values: list[float], base: float = 1.0) -> tuple[float, float, float]:
    """Median, and how far down and up the runs go from it, all relative to `base`."""
    median = statistics.median(values)
    return median / base, (median - min(values)) / base, (max(values) - median) / base


def plot(rows: dict[str, dict], settings: Settings, path: Path) -> None:
    """Speeds relative to fp16, and tokens a second against clients: medians, and from the least to the most."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (bars, lines) = plt.subplots(1, 2, figsize=(14, 5), layout="constrained")
    speeds = measured({name: row for name, row in rows.items() if name == "fp16"}, "latency", "throughput")
    width = 1 / (len(rows) + 1)
    for i, (name, row) in enumerate(rows.items()):
        color = f"C{i}"
        bars.bar(0, 0, color=color, label=name)  # the legend's, for a row that has no speed
        for j, task in enumerate(speeds):
            values, base = (rate(r, task, settings) for r in (row, rows["fp16"]))
            if values:
                height, *spread = _spread(values, statistics.median(base))
                place = j + (i - (len(rows) - 1) / 2) * width
                bars.bar(place, height, width, yerr=[[part] for part in spread], color=color, capsize=3)
        served = [(n, row["serve"][str(n)]) for _, n in measured({name: row}, "serve")]
        points = [(n, *_spread([run["output_throughput"] for run in runs])) for n, runs in served]
        if points:
            clients, medians, *spread = zip(*points, strict=True)
            lines.errorbar(clients, medians, yerr=spread, color=color, marker=".", capsize=3)
    titles = [f"batch {count}" if kind == "latency" else kind for kind, count in speeds]
    bars.set(ylabel="tokens/s, × fp16", xticks=range(len(titles)), xticklabels=titles)
    lines.set(xlabel="clients", ylabel="tokens/s")
    clients = [n for _, n in measured(rows, "serve")]
    if clients:
        lines.set(xscale="log", xticks=clients, xticklabels=clients, ylim=(0, None))
        lines.minorticks_off()
    figure.legend(*bars.get_legend_handles_labels(), loc="outside right upper")
    figure.savefig(path, dpi=120)
