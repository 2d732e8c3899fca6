"""The folder in which an unfinished run keeps its work: lock, settings, clock, and steps that are computed once."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from . import parallel
from .errors import UserError, WriteError, explain_write
from .files import write_json, write_tensors

BEAT = 5.0  # seconds between marks of the clock
SETTINGS = "settings.json"
STABLE = "train.stable"  # the state of a training before its learning rates fell
TEACHER = "teacher"  # states of the 16-bit model
# of a shorter run: what a longer one does not take over; plan and teacher are of a text with fewer samples
_OWN = (SETTINGS, "lock", "clock.json", "train.state", "training.jsonl", "train", "final")
_OWN += ("plan", f"{TEACHER}.safetensors")
_MAY_DIFFER = "train_tokens"


class Workspace:
    """The unfinished run's folder: `OUT.partial` beside the output folder, or inside it where that is a mount point.

    Every file in it is written whole or not at all. The output folder appears at the very end, complete. Of several
    processes the first one writes; the others wait, and read.

    Args:
        out: the output folder; a symbolic link stands for its target.
        resume: whether to go on from an earlier, interrupted run.
        extends: kept work of a finished run with fewer `train_tokens`, to go on from; or None.

    Attributes:
        path: the folder.
        log: file for log lines.
        resumed: whether an earlier run has left work here.
    """

    def __init__(self, out: Path, resume: bool, extends: Path | None = None):
        self.out, self.resume, self.extends = (out.resolve() if out.is_symlink() else out), resume, extends
        self._inside = self.out.is_mount()  # nothing can be moved onto a mount point
        self.path = self.out / ".partial" if self._inside else self.out.with_name(self.out.name + ".partial")
        self.log = self.out / "calibrate.log" if self._inside else self.out.with_name(self.out.name + ".log")
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
        with self._opened(settings, needed_bytes) if parallel.is_first() else contextlib.nullcontext():
            self.resumed = parallel.from_first(lambda: self.resumed)
            yield

    @contextlib.contextmanager
    def _opened(self, settings: dict[str, Any], needed_bytes: int) -> Iterator[None]:
        self._check_out()
        try:
            with self._locked():
                record = self.path / SETTINGS
                self.resumed = record.exists()
                if self.resumed and not self.resume:
                    raise UserError(
                        f"{self.path} holds an unfinished run; continue it with --resume, or remove the folder"
                    )
                if self.resumed:
                    self._check_settings(settings, json.loads(record.read_text()))
                self._check_space(needed_bytes)
                with self._clock():
                    if self.extends is not None and not self.resumed:
                        self._take_over(self.extends, settings)
                    write_json(record, settings)
                    yield
        except WriteError as error:
            raise UserError(
                f"{error}. Finished blocks are kept: free some space and run again with --resume"
            ) from error

    def check_free(self, needed_bytes: int) -> None:
        """Refuse an output folder that a run could not write, by trying, and leave nothing behind.

        Raises:
            UserError: as `opened`.
        """
        existed = self.path.exists()
        missing = [folder for folder in self.path.parents if not folder.exists()]
        self._check_out()
        try:
            with self._locked():
                self._check_space(needed_bytes)
        finally:
            if not existed:
                self.remove()
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()

    def _check_out(self) -> None:
        own = {self.path.name, self.log.name} if self._inside else set()
        try:
            if self.out.exists() and (not self.out.is_dir() or {f.name for f in self.out.iterdir()} - own):
                raise UserError(f"{self.out} exists and is not empty; choose another output folder or remove it")
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "lock").touch()
        except OSError as error:
            raise UserError(f"{self.out}: cannot be written ({error}); choose another output folder") from error

    def _check_space(self, needed: int) -> None:
        present = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        free = shutil.disk_usage(self.path).free + present
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
                raise UserError(f"{self.out} is in use by another running bq-calibrate; let it end first") from error
            yield

    def _check_settings(self, settings: dict[str, Any], before: dict[str, Any]) -> None:
        for key, value in settings.items():
            if value != before.get(key):
                raise UserError(
                    f"--resume: {key} was {before.get(key)!r} in the unfinished run and is {value!r} now; "
                    f"use the same settings, or remove {self.path}"
                )

    def _take_over(self, folder: Path, settings: dict[str, Any]) -> None:
        """Begin with the work of a run that has trained on fewer tokens."""
        record = folder / SETTINGS
        if not record.is_file() or not (folder / STABLE).is_dir():
            raise UserError(
                f"--extend {folder}: expected the work that a run with --schedule wsd --keep-work has left in OUT.work"
            )
        before = json.loads(record.read_text())
        for key, value in settings.items():
            if key != _MAY_DIFFER and value != before.get(key):
                raise UserError(
                    f"--extend {folder}: {key} was {before.get(key)!r} in that run and is {value!r} now; only "
                    "--train-tokens may differ"
                )
        if settings[_MAY_DIFFER] <= before[_MAY_DIFFER]:
            raise UserError(
                f"--extend {folder}: that run has trained on {before[_MAY_DIFFER]} tokens; ask for more of them "
                "with --train-tokens"
            )
        with explain_write(self.path):
            for file in (file for file in folder.rglob("*") if file.is_file()):
                place = file.relative_to(folder)
                if place.parts[0] not in _OWN:
                    (self.path / place).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, self.path / place)

    # ---- the clock

    @contextlib.contextmanager
    def _clock(self) -> Iterator[None]:
        """Count the time of interrupted processes of this run: each marked the clock every few seconds."""
        clock = self.path / "clock.json"
        if clock.exists():
            before = json.loads(clock.read_text())
            self._elapsed_before = before["elapsed_before"] + max(0.0, clock.stat().st_mtime - before["started"])
        write_json(clock, {"started": self._started, "elapsed_before": self._elapsed_before})
        ended = threading.Event()

        def mark() -> None:
            while not ended.wait(BEAT):
                with contextlib.suppress(OSError):
                    os.utime(clock)

        marker = threading.Thread(target=mark, daemon=True)
        marker.start()
        try:
            yield
        finally:
            ended.set()
            marker.join()
            with contextlib.suppress(OSError):
                os.utime(clock)

    def elapsed(self) -> float:
        """Seconds of the whole run, interrupted processes included."""
        return self._elapsed_before + time.time() - self._started

    # ---- steps that are computed unless their files are there

    def json(self, name: str, compute: Callable[[], Any], together: bool = False) -> Any:
        """Data of a step that is kept as NAME.json.

        Args:
            name: of the step.
            compute: called by the first process alone.
            together: every process calls `compute`.
        """
        if not self.has(name) and (together or parallel.is_first()):
            data = compute()
            if parallel.is_first():
                write_json(self._file(name, ".json"), data)
        return self.report(name)

    def tensors(self, name: str, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Tensors of a step that are kept as NAME.safetensors; the first process computes them."""
        file = self._file(name, ".safetensors")
        if parallel.is_first() and not file.exists():
            write_tensors(file, compute())
        parallel.wait()
        return load_file(file)

    def step(self, name: str, compute: Callable[[], tuple[dict[str, torch.Tensor], Any]]) -> Any:
        """Report of a step whose tensors and report are kept as NAME.safetensors and NAME.json.

        Every process calls `compute`; the first one's results are kept.
        """
        if not self.has(name):
            tensors, data = compute()
            if parallel.is_first():
                write_tensors(self._file(name, ".safetensors"), tensors)
                write_json(self._file(name, ".json"), data)  # last: its presence means done
        return self.report(name)

    def report(self, name: str) -> Any:
        """Data or report of a step that has been computed."""
        return parallel.from_first(lambda: json.loads(self._file(name, ".json").read_text()))

    def has(self, name: str) -> bool:
        """Whether a step has been computed; every process asks."""
        return parallel.from_first(self._file(name, ".json").exists)

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors of a step that has been computed."""
        return load_file(self._file(name, ".safetensors"))

    def _file(self, name: str, suffix: str) -> Path:
        file = self.path / (name + suffix)
        file.parent.mkdir(exist_ok=True)
        return file

    # ---- the end

    def publish(self, finished: Path) -> None:
        """Move a finished checkpoint to its place.

        Raises:
            WriteError: if that fails.
        """
        with explain_write(self.out):
            if not self._inside:
                os.replace(finished, self.out)
                return
            for file in sorted(finished.iterdir(), key=lambda file: file.name == "config.json"):  # the config last
                os.replace(file, self.out / file.name)

    def remove(self) -> None:
        """Remove the folder, once the checkpoint is published."""
        shutil.rmtree(self.path, ignore_errors=True)

    def keep(self) -> Path:
        """Call the folder `OUT.work`, once the checkpoint is published, for a longer run to go on from."""
        kept = self.path.with_name(self.path.name.replace(".partial", ".work"))
        with explain_write(kept):
            shutil.rmtree(kept, ignore_errors=True)
            os.replace(self.path, kept)
        return kept
