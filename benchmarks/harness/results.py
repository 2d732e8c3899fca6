"""The end of every benchmark: tables and omissions are printed, JSON is written, a table and a plot lie beside it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from io import StringIO
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record as JSON; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def write_plot(path: Path, figure: Figure) -> None:
    """Write a figure as an image; its folder is made if it is missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def write_markdown(path: Path, table: Table) -> None:
    """Write a table as Markdown, one line per row."""
    table.box = box.MARKDOWN
    page = Console(file=StringIO(), width=1000)
    page.print(table)
    path.write_text(page.file.getvalue().strip() + "\n")


def finish(
    console: Console,
    record: dict[str, Any],
    as_json: Path,
    tables: Iterable[Table] = (),
    plot: Callable[[], Figure] | None = None,
    markdown: Table | None = None,
) -> None:
    """Print the tables and what is left out, then write the results.

    Args:
        console: where to print.
        record: the results; `left_out`, if there, names each omission with its reason.
        as_json: file of the record. The plot lies beside it as .png, the Markdown table as .md.
        tables: printed in that order; empty ones are not.
        plot: draws the figure.
        markdown: the table of the Markdown file.
    """
    for table in tables:
        if table.row_count:
            console.print(table)
    for name, reason in record.get("left_out", {}).items():
        console.print(f"left out: {name}: {reason}", markup=False, highlight=False, soft_wrap=True)
    write_json(as_json, record)
    if markdown:
        write_markdown(as_json.with_suffix(".md"), markdown)
    if plot:
        write_plot(as_json.with_suffix(".png"), plot())
