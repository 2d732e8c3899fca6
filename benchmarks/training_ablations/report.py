"""The table of the ablations."""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from rich.table import Table


def table_of(record: dict[str, Any]) -> Table:
    """Divergence on held-out text before and after training by arm; several seeds as mean ± standard deviation."""
    table = Table("what is changed", "arm", "KL before", "KL after", "training loss at the end")
    for question, arms in record["results"].items():
        for name, rows in arms.items():
            after = [row["after"] for row in rows]
            spread = f" ± {stdev(after):.4f}" if len(after) > 1 else ""
            table.add_row(
                question,
                name,
                f"{rows[0]['before']:.4f}",
                f"{fmean(after):.4f}{spread}",
                f"{fmean(row['training_loss'][1] for row in rows):.4f}",
            )
    return table
