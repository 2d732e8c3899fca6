"""Summary, table and plot of the ablations."""

from __future__ import annotations

import math
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.table import Table

CURVE_EVERY = 10  # steps between the points of a curve in the results
COLUMNS = 3  # pictures per line
EARLY_STEP = 200
GOAL = 1.01  # times the lowest loss of a group's first line

Groups = dict[str, list[dict[str, Any]]]


def share_by(losses: list[float], step: int) -> float:
    """Share of the whole gain that is reached after some steps."""
    gain = losses[0] - min(losses)
    return (losses[0] - min(losses[: step + 1])) / gain if gain > 0 else 1.0


def steps_to(losses: list[float], goal: float) -> int | None:
    """The first step with a loss of `goal` or less."""
    return next((step for step, loss in enumerate(losses) if loss <= goal), None)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def summary(measured: list[dict[str, Any]], goals: list[float]) -> dict[str, float | None]:
    """Geometric mean of the held-out errors; means over layers of the rest; None where a layer misses its goal."""
    reached = [steps_to(one["losses"], goal) for one, goal in zip(measured, goals, strict=True)]
    return {
        "error": math.exp(_mean([math.log(one["error"]) for one in measured])),
        f"gain by step {EARLY_STEP}": _mean([share_by(one["losses"], EARLY_STEP) for one in measured]),
        "steps": _mean([len(one["losses"]) - 1 for one in measured]),
        "steps to goal": None if None in reached else _mean(reached),
        "seconds": _mean([one["seconds"] for one in measured]),
    }


def curve(measured: list[dict[str, Any]]) -> list[float]:
    """Geometric mean over layers of the objective at every step; a layer that has converged keeps its last value."""
    longest = max(len(one["losses"]) for one in measured)
    padded = [one["losses"] + one["losses"][-1:] * (longest - len(one["losses"])) for one in measured]
    return torch.tensor(padded).log().mean(0).exp()[::CURVE_EVERY].tolist()


def lines_of(measured: dict[str, list[dict[str, Any]]], settings: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines of one group: its values, the first of which sets the goals.

    Args:
        measured: results of all layers by value.
        settings: by value.
    """
    first = next(iter(measured.values()))
    goals = [GOAL * min(one["losses"]) for one in first]
    return [
        {
            "value": value,
            "setting": settings[value],
            "summary": summary(found, goals),
            "errors": {one["case"]: one["error"] for one in found},
            "curve": curve(found),
        }
        for value, found in measured.items()
    ]


def table_of(groups: Groups) -> Table:
    """A line per setting; `goal` is 1 % above the lowest loss of the group's first line, layer by layer."""
    early = f"gain by step {EARLY_STEP}"
    table = Table("changed", "to", "held-out error", early, "steps", "steps to goal", "seconds per rotation")
    for name, lines in groups.items():
        for line in lines:
            s = line["summary"]
            goal = "not reached" if s["steps to goal"] is None else f"{s['steps to goal']:.0f}"
            cells = f"{s['error']:.4f}", f"{s[early]:.0%}", f"{s['steps']:.0f}", goal
            table.add_row(name, line["value"], *cells, f"{s['seconds']:.1f}")
        table.add_section()
    return table


def plot(groups: Groups) -> Figure:
    """Objective against the step; a picture per group."""
    lines = math.ceil(len(groups) / COLUMNS)
    figure = Figure(figsize=(15, 4 * lines), layout="tight")
    axes = figure.subplots(lines, COLUMNS, squeeze=False)
    for axis, (name, found) in zip(axes.flat, groups.items(), strict=False):
        for line in found:
            steps = range(0, CURVE_EVERY * len(line["curve"]), CURVE_EVERY)
            axis.plot(steps, line["curve"], marker="." if len(steps) == 1 else None, label=line["value"])
        axis.set(title=name, xlabel="step", ylabel="objective, geometric mean")
        axis.legend(fontsize=7)
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    return figure
