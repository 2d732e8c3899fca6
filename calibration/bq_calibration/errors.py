"""The errors that the commands show to a user without a traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError


class UserError(Exception):
    """Something that the user can put right; the message says what is wrong, where, and what to do."""


class WriteError(UserError):
    """A file could not be written; the message names it and says why."""


@contextlib.contextmanager
def explain(message: str) -> Iterator[None]:
    """Turn whatever a library raises over a user's file into a UserError of one line.

    Args:
        message: names the file and the problem; the library's own words follow in parentheses.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:  # libraries turn a Ctrl-C while they import into an error of their own
            if isinstance(cause, KeyboardInterrupt):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{message} ({words[:300]})") from error


@contextlib.contextmanager
def explain_write(path: Path) -> Iterator[None]:
    """Turn a failed write (no space, no permission, a file-size limit) into a WriteError that names `path`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = "no space left on the device" if "No space left" in str(error) else str(error)
        raise WriteError(f"{path}: could not be written: {reason}") from error


def check_writable(file: Path) -> None:
    """Refuse a file that cannot be written, and leave it as it is.

    Raises:
        WriteError: naming the file.
    """
    with explain_write(file):
        existed = file.exists()
        with open(file, "ab"):
            pass
        if not existed:
            file.unlink()
