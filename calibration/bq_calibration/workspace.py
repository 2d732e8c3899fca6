"""The folder in which an unfinished run keeps its work: lock, settings, clock, and steps that are computed once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from .errors import UserError, WriteError
from .files import write_json, write_tensors


class Workspace:
    """`OUT.partial` beside the output folder; every file in it is written whole or not at all.

    The output folder appears at the very end, complete.

    Args:
        out: the output folder.
        resume: whether to go on from an earlier, interrupted run.

    Attributes:
        path: the folder.
        resumed: whether an earlier run has left work here.
    """

    def __init__(self, out: Path, resume: bool):
        self.out, self.resume = out, resume
        self.path = out.with_name(out.name + ".partial")
        self.resumed = False
        self._started, self._elapsed_before = time.time(), 0.0

    # ---- opening it

    @contextlib.contextmanager
    def opened(self, settings: dict[str, Any], needed_bytes: int) -> Iterator[None]:
        """Make the folder or go on in it, alone, for as long as the context lasts.

        Args:
            settings: of the run; an unfinished run with other settings is refused.
            needed_bytes: free space that the run needs.

        Raises:
            UserError: if the output folder is not empty, another run works on it, an earlier run is unfinished or had
                other settings, or something cannot be written.
        """
        if self.out.exists() and (not self.out.is_dir() or any(self.out.iterdir())):
            raise UserError(f"{self.out} exists and is not empty; choose another output folder or remove it")
        record = self.path / "settings.json"
        if not self.resume and record.exists():
            raise UserError(f"{self.path} holds an unfinished run; continue it with --resume, or remove the folder")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._check_space(needed_bytes)
            with self._locked():
                self.resumed = record.exists()
                if self.resumed:
                    self._check_settings(settings, json.loads(record.read_text()))
                self._start_clock()
                write_json(record, settings)
                yield
        except WriteError as error:
            raise UserError(
                f"{error}. Finished blocks are kept: free some space and run again with --resume"
            ) from error
        except PermissionError as error:
            raise UserError(f"{self.out}: cannot be written ({error})") from error

    def _check_space(self, needed: int) -> None:
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise UserError(
                f"{self.path.parent}: no space left: {free / 1e9:.2f} GB free, {needed / 1e9:.2f} GB needed; "
                "free some or choose another output folder"
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self.path / "lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"{self.out} is in use by another running bq-calibrate") from error
            yield

    def _check_settings(self, settings: dict[str, Any], before: dict[str, Any]) -> None:
        for key, value in settings.items():
            if value != before.get(key):
                raise UserError(
                    f"--resume: {key} was {before.get(key)!r} in the unfinished run and is {value!r} now; "
                    f"use the same settings, or remove {self.path}"
                )

    # ---- the clock

    def _start_clock(self) -> None:
        """Count the time of interrupted processes of this run, each up to the last tensors that it saved."""
        clock = self.path / "clock.json"
        if clock.exists():
            before = json.loads(clock.read_text())
            saved = max((file.stat().st_mtime for file in self.path.rglob("*.safetensors")), default=0.0)
            self._elapsed_before = before["elapsed_before"] + max(0.0, saved - before["started"])
        write_json(clock, {"started": self._started, "elapsed_before": self._elapsed_before})

    def elapsed(self) -> float:
        """Seconds of the whole run, interrupted processes included."""
        return self._elapsed_before + time.time() - self._started

    # ---- steps that are computed unless their files are there

    def json(self, name: str, compute: Callable[[], Any]) -> Any:
        """Data of a step that is kept as NAME.json."""
        file = self._file(name, ".json")
        if not file.exists():
            write_json(file, compute())
        return json.loads(file.read_text())

    def tensors(self, name: str, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Tensors of a step that are kept as NAME.safetensors."""
        file = self._file(name, ".safetensors")
        if not file.exists():
            write_tensors(file, compute())
        return load_file(file)

    def step(self, name: str, compute: Callable[[], tuple[dict[str, torch.Tensor], Any]]) -> Any:
        """Report of a step whose tensors and report are kept as NAME.safetensors and NAME.json."""
        report = self._file(name, ".json")
        if not self.has(name):
            tensors, data = compute()
            write_tensors(self._file(name, ".safetensors"), tensors)
            write_json(report, data)  # last: its presence means done
        return json.loads(report.read_text())

    def has(self, name: str) -> bool:
        """Whether a step has been computed."""
        return self._file(name, ".json").exists()

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors of a step that has been computed."""
        return load_file(self._file(name, ".safetensors"))

    def _file(self, name: str, suffix: str) -> Path:
        file = self.path / (name + suffix)
        file.parent.mkdir(exist_ok=True)
        return file

    # ---- the end

    def publish(self, finished: Path) -> None:
        """Move a finished checkpoint to its place."""
        os.replace(finished, self.out)

    def remove(self) -> None:
        """Remove the folder, once the checkpoint is published."""
        shutil.rmtree(self.path)
