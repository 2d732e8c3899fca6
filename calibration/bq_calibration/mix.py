"""The mix of texts for end-to-end training: which, and how much of each. Nothing here imports torch."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from .errors import UserError

SELF = "self"  # text that the model itself writes
NAMED = ("wikitext2", "c4")
EVALUATION = NAMED  # texts of `bq-eval --perplexity` that are kept out of training by default
FILES = {".txt": "text", ".raw": "text", ".tokens": "text", ".jsonl": "json", ".parquet": "parquet"}
NO_FILTER = "none"
_HUB = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Part:
    """A part of the mix: a name as `--mix` has it, and its weight, by which rows are shared out."""

    name: str
    weight: float

    @property
    def on_hub(self) -> bool:
        """Whether the text comes from the Hugging Face Hub."""
        return self.name != SELF and not Path(self.name).is_file()


def parse_mix(mix: str) -> list[Part]:
    """Parts of `NAME[:WEIGHT],…`; a weight that is not given is 1.

    A name is `self`, `wikitext2`, `c4`, a .txt, .jsonl or .parquet file, or `org/name` or `org/name/config` of the Hub.

    Raises:
        UserError: if a weight is no positive number, a name is unknown or stands twice, or a file is not there.
    """
    parts: list[Part] = []
    for item in mix.split(","):
        name, _, number = item.rpartition(":") if ":" in item and not Path(item).is_file() else (item, "", "1")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (name and 0 < weight < math.inf):
            raise UserError(f"--mix {item!r}: expected NAME or NAME:WEIGHT with a weight above 0")
        _check_name(name)
        if name in (part.name for part in parts):
            raise UserError(f"--mix: {name} stands there twice; give it one weight")
        parts.append(Part(name, weight))
    return parts


def _check_name(name: str) -> None:
    if name in (SELF, *NAMED):
        return
    path = Path(name)
    if path.suffix in FILES:
        if not path.is_file():
            raise UserError(f"--mix {name}: no such file")
    elif path.exists() or not _HUB.fullmatch(name):
        raise UserError(
            f"--mix {name!r}: use self, wikitext2, c4, a .txt, .jsonl or .parquet file, or org/name of the Hub"
        )
