"""Goes through the rows, most important first, and keeps every result at once."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.harness.results import write_json
from benchmarks.vllm_serving.models import OTHERS, VARIABLES, Config, write_row
from benchmarks.vllm_serving.processes import OUT_OF_TIME, logged_facts, run_apart
from benchmarks.vllm_serving.settings import Settings, Task
from benchmarks.vllm_serving.worker import EXTENSION


def resumed(path: Path, record: dict) -> dict:
    """The record of an earlier command, for the given one to go on with.

    Raises:
        SystemExit: if it was measured on another machine or with other settings.
    """
    kept = json.loads(path.read_text())
    if differing := [key for key in record if kept.get(key) != record[key]]:
        sys.exit(f"{path}: measured with another {', '.join(differing)}; figures would not compare")
    return kept


@dataclass
class Session:
    """One run over rows.

    Attributes:
        config: config.json of the model.
        checkpoint: folder of its weights, if it has any.
        settings: the same for all rows.
        folder: for model configs, logs and traces.
        tokenizer: folder of the tokenizer.
        deadline: by time.monotonic().
        record: results, `rows` and `left_out` among them.
        as_json: file that the record is written to after every task.
        console: where to print.
        broken: rows of ours that failed.
        dead: rows whose engine does not start.
        slowest_start: seconds from the start of a process until its engine was ready.
    """

    config: Config
    checkpoint: Path | None
    settings: Settings
    folder: Path
    tokenizer: Path
    deadline: float
    record: dict[str, Any]
    as_json: Path
    console: Console
    broken: list[str] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    slowest_start: float = 0.0

    def measure(self, function: Callable, tasks: list[Task], names: list[str]) -> None:
        """Measure tasks on each of the named rows, those not measured yet, as far as time goes.

        Args:
            function: `engine.offline` or `engine.online`.
            tasks: for it.
            names: of rows.
        """
        for name in names:
            row = self.record["rows"][name]
            todo = [(kind, n) for kind, n in tasks if str(n) not in row.get(kind, {})]
            title = f"{name}, {function.__name__}"
            if not todo:
                continue
            if name in self.dead:
                self.record["left_out"][title] = "its engine does not start"
            elif time.monotonic() + self.slowest_start > self.deadline:
                self.record["left_out"][title] = OUT_OF_TIME
            else:
                self.console.print(f"{name}: {', '.join(f'{kind} {n}' for kind, n in todo)}")
                self._measure_row(function, todo, name, row)

    def _measure_row(self, function: Callable, todo: list[Task], name: str, row: dict[str, Any]) -> None:
        started, folder = time.monotonic(), self.folder / name
        flags = write_row(name, self.config, self.checkpoint, folder)
        flags += ("--tokenizer", str(self.tokenizer), "--worker-extension-cls", EXTENSION, *self.settings.flags)

        def receive(key: Any, value: Any) -> None:
            if key == "memory":
                self.slowest_start = max(self.slowest_start, time.monotonic() - started)
                row.update(value)
            else:
                kind, count = key
                row.setdefault(kind, {})[str(count)] = value
            write_json(self.as_json, self.record)

        log = folder / f"{function.__name__}.log"
        arguments = todo, flags, self.settings, folder
        limits = {"log": log, "deadline": self.deadline, "receive": receive}
        reason = run_apart(function, *arguments, **limits, variables=VARIABLES.get(name))
        row.update(logged_facts(log))
        if reason:
            undone = [f"{kind} {n}" for kind, n in todo if str(n) not in row.get(kind, {})]
            self.record["left_out"][f"{name}, {', '.join(undone)}"] = reason
            if name not in OTHERS and reason != OUT_OF_TIME:
                self.broken.append(name)
            if "weights_gib" not in row:
                self.dead.add(name)
        write_json(self.as_json, self.record)
