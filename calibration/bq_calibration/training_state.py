"""The state of a training on disk: safetensors by torch.distributed.checkpoint, which any number of processes can read.

A state is a folder `STEP` inside another. It gets its name once it is whole, and older ones are removed then.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed.checkpoint as checkpoint
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from . import parallel
from .errors import explain_write


def latest_state(folder: Path) -> Path | None:
    """The last state in a folder; None where there is none."""
    return max(folder.glob("[0-9]*"), default=None)


def save_state(folder: Path, step: int, tensors: dict[str, torch.Tensor]) -> None:
    """Write a state; every process calls it with its rows of sharded tensors and with all others.

    Raises:
        WriteError: if that fails.
    """
    unfinished, finished = folder / "unfinished", folder / f"{step:09d}"
    with explain_write(folder):
        if parallel.is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        with _own_errors():
            writer = HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
            checkpoint.save(tensors, storage_writer=writer, no_dist=parallel.size() == 1)
        if parallel.is_first():
            shutil.rmtree(finished, ignore_errors=True)
            os.replace(unfinished, finished)
            for state in set(folder.glob("[0-9]*")) - {finished}:
                shutil.rmtree(state)
    parallel.wait()


def load_state(state: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Read a state into tensors that have its names and shapes, sharded or not."""
    with _own_errors():
        reader = HuggingFaceStorageReader(str(state))
        checkpoint.load(tensors, storage_reader=reader, no_dist=parallel.size() == 1)


def empty_tensors(state: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """Tensors of the shapes and dtypes that a state has under some names."""
    known = HuggingFaceStorageReader(str(state)).read_metadata().state_dict_metadata
    return {name: torch.empty(known[name].size, dtype=known[name].properties.dtype) for name in names}


@contextlib.contextmanager
def _own_errors() -> Iterator[None]:
    """Raise the error itself that the library has wrapped, Ctrl-C included; and do without its word on one process."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None
