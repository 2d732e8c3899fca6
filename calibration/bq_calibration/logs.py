"""Log lines of a run: to a file beside the checkpoint always, to stderr where no progress bar is shown."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path

from .console import is_first
from .errors import explain_write

LOGGER = logging.getLogger("bq_calibration")
FORMAT = "%(asctime)s %(message)s"
# what they say while transformers imports torchao: of its CUDA libraries where there is no CUDA, of its use of torch
CHATTY = ("torchao", "torch.utils._pytree")


def quieten_libraries() -> None:
    """Keep warnings that no user can act on from the terminal."""
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextlib.contextmanager
def log_to(file: Path | None) -> Iterator[None]:
    """Append the package's log lines to a file, or print them on stderr, for as long as the context lasts.

    Of several processes only the first one's lines are.

    Args:
        file: None for stderr.

    Raises:
        WriteError: if the file cannot be written.
    """
    if not is_first():
        handler: logging.Handler = logging.NullHandler()
    elif file is None:
        handler = logging.StreamHandler()
    else:
        with explain_write(file):
            handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter(FORMAT))
    level = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.setLevel(level)
        LOGGER.removeHandler(handler)
        handler.close()
