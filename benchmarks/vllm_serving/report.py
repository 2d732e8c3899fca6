"""Tables and plot of what serving.py has measured."""

from __future__ import annotations

import statistics

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from benchmarks.vllm_serving.settings import Settings, Task
from benchmarks.vllm_serving.step_profile import CATEGORIES

Rows = dict[str, dict]


def rate(row: dict, task: Task, settings: Settings) -> list[float]:
    """Tokens per second of every run of a task, generated ones or, of a prefill, those of the prompt."""
    kind, count = task
    tokens = {"latency": settings.latency[1], "prefill": settings.prefill, "throughput": settings.load[1]}[kind]
    return [count * tokens / seconds for seconds in row.get(kind, {}).get(str(count), [])]


def _cell(values: list[float], base: list[float]) -> str:
    if not values:
        return ""
    median = statistics.median(values)
    ratio = f", {median / statistics.median(base):.2f}×" if base else ""
    return f"{median:,.0f} ±{(max(values) - min(values)) / 2 / median:.0%}{ratio}"


def measured(rows: Rows, *kinds: str) -> list[Task]:
    """Tasks of some kinds of which a row has a result."""
    return [(kind, n) for kind in kinds for n in sorted({int(n) for row in rows.values() for n in row.get(kind, {})})]


def _titles(tasks: list[Task]) -> list[str]:
    return [f"batch {count}" if kind == "latency" else kind for kind, count in tasks]


def speed_table(rows: Rows, settings: Settings) -> Table:
    """Tokens per second: median, half the range, ratio to fp16; with weights and room for the KV cache."""
    base, speeds = rows.get("fp16", {}), measured(rows, "latency", "prefill", "throughput")
    table = Table("row", "weights, GiB", "room for KV, tokens", *_titles(speeds), title="tokens/s")
    for name, row in rows.items():
        cells = (_cell(rate(row, task, settings), rate(base, task, settings)) for task in speeds)
        weights, room = row.get("loading_gib", row.get("weights_gib")), row.get("kv_tokens")
        table.add_row(name, f"{weights:.3f}" if weights else "", f"{room:,.0f}" if room else "", *cells)
    kernels = [f"{name}: {row['kernel']}" for name, row in rows.items() if "kernel" in row]
    table.caption = "; ".join(kernels) or None
    return table


def serving_table(rows: Rows) -> Table:
    """Time to the first token, time per token and tokens per second, by number of clients."""
    base, columns = rows.get("fp16", {}), ("TTFT, ms", "TPOT, ms", "tokens/s")
    table = Table("clients", "row", *columns, title="serving: median ± half the range, × fp16")
    keys = ("median_ttft_ms", "median_tpot_ms", "output_throughput")
    for kind, count in measured(rows, "serve"):
        for name, row in rows.items():
            mine, other = (r.get(kind, {}).get(str(count), []) for r in (row, base))
            if mine:
                cells = (_cell([run[key] for run in mine], [run[key] for run in other]) for key in keys)
                table.add_row(str(count), name, *cells)
    return table


def profile_table(rows: Rows) -> Table:
    """Microseconds of a decode step by category."""
    table = Table("batch", "row", *CATEGORIES, "other", "gaps", "step", title="a decode step, µs")
    for name, row in rows.items():
        for count, parts in row.get("profile", {}).items():
            cells = (f"{parts[key]:.0f} ({parts[key] / parts['step']:.0%})" for key in list(parts)[:-1])
            table.add_row(count, name, *cells, f"{parts['step']:.0f}")
    return table


def tables(rows: Rows, settings: Settings) -> list[Table]:
    """All tables; some may be empty."""
    return [speed_table(rows, settings), serving_table(rows), profile_table(rows)]


def _spread(values: list[float], base: float = 1.0) -> tuple[float, float, float]:
    """Median, and the distance of the least and of the greatest from it, all relative to `base`."""
    median = statistics.median(values)
    return median / base, (median - min(values)) / base, (max(values) - median) / base


def _draw_speeds(bars: Axes, rows: Rows, settings: Settings) -> None:
    speeds = measured({name: row for name, row in rows.items() if name == "fp16"}, "latency", "prefill", "throughput")
    width = 1 / (len(rows) + 1)
    for i, (name, row) in enumerate(rows.items()):
        bars.bar(0, 0, color=f"C{i}", label=name)  # the legend's, for a row that has no speed
        for j, task in enumerate(speeds):
            values, base = (rate(r, task, settings) for r in (row, rows["fp16"]))
            if values:
                height, *spread = _spread(values, statistics.median(base))
                place = j + (i - (len(rows) - 1) / 2) * width
                bars.bar(place, height, width, yerr=[[part] for part in spread], color=f"C{i}", capsize=3)
    bars.set(ylabel="tokens/s, × fp16", xticks=range(len(speeds)), xticklabels=_titles(speeds))


def _draw_serving(lines: Axes, rows: Rows) -> None:
    for i, (name, row) in enumerate(rows.items()):
        served = [(n, row["serve"][str(n)]) for _, n in measured({name: row}, "serve")]
        points = [(n, *_spread([run["output_throughput"] for run in runs])) for n, runs in served]
        if points:
            clients, medians, *spread = zip(*points, strict=True)
            lines.errorbar(clients, medians, yerr=spread, color=f"C{i}", marker=".", capsize=3)
    lines.set(xlabel="clients", ylabel="tokens/s")
    clients = [n for _, n in measured(rows, "serve")]
    if clients:
        lines.set(xscale="log", xticks=clients, xticklabels=clients, ylim=(0, None))
        lines.minorticks_off()


def plot(rows: Rows, settings: Settings) -> Figure:
    """Speeds relative to fp16, and tokens per second against clients: medians, and from the least to the most."""
    figure = Figure(figsize=(14, 5), layout="constrained")
    bars, lines = figure.subplots(1, 2)
    _draw_speeds(bars, rows, settings)
    _draw_serving(lines, rows)
    figure.legend(*bars.get_legend_handles_labels(), loc="outside right upper")
    return figure
