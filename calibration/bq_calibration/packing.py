"""The rows of one part of a mix: units packed end to end, epoch after epoch, from wherever an earlier run stopped."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from .errors import UserError
from .ngrams import NGRAM
from .text_source import TextSource, Unit


@dataclass
class Packing:
    """How far a part is; a file keeps the same fields.

    Attributes:
        rows: that are packed.
        epoch: that is being read.
        place: units of it that are read.
        filled: whether this epoch has given any text.
        pending: tokens that are read and in no row yet.
        count: units per epoch, once known.
        left_out: units of the first epoch that are left out, by evaluation text.
        held_out: keys of the units in the rows that are held out, which do not come again.
    """

    rows: int = 0
    epoch: int = 0
    place: int = 0
    filled: bool = False
    pending: list[int] = field(default_factory=list)
    count: int | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    held_out: list[int] = field(default_factory=list)

    @property
    def epochs(self) -> float | None:
        """How many times the part has been read; None where it has no end, or has not come to it."""
        return self.epoch + self.place / self.count if self.count else None

    def pack(self, source: TextSource, name: str, prefix: list[int], seqlen: int, held_out: int) -> Iterator[list[int]]:
        """Rows of `seqlen` tokens without end; the fields move along.

        Args:
            source: of the units.
            name: of the part, for messages.
            prefix: tokens in front of every row.
            seqlen: tokens per row.
            held_out: as many of the part's first rows are held out.

        Raises:
            UserError: if there is nothing to pack.
        """
        step, self.count = seqlen - len(prefix), self.count or source.count
        units = source.units(self.epoch, self.place)
        while True:
            while len(self.pending) >= step:
                row = prefix + self.pending[:step]
                del self.pending[:step]
                self.rows += 1
                yield row
            unit = next(units, None)
            if unit is None:
                self._check_filled(name)
                self.count = self.place
                self.epoch, self.place, self.filled = self.epoch + 1, 0, False
                units = source.units(self.epoch, 0)
            else:
                self.place += 1
                self._take(unit, held_out)

    def _take(self, unit: Unit, held_out: int) -> None:
        if unit.met is not None:
            if self.epoch == 0:
                self.left_out[unit.met] = self.left_out.get(unit.met, 0) + 1
        elif self.rows < held_out:
            self.held_out.append(unit.key)
        elif unit.key in self.held_out:
            return
        self.pending += unit.tokens
        self.filled |= bool(unit.tokens)

    def _check_filled(self, name: str) -> None:
        """Refuse a source that would be read for ever and gives nothing."""
        if self.filled:
            return
        if self.epoch:
            raise UserError(f"--mix {name}: all of its text is held out; add text, or lower --held-out")
        met = f": {sum(self.left_out.values())} share {NGRAM} words in a row with {', '.join(self.left_out)}"
        raise UserError(f"--mix {name}: no text is left of {self.place} documents{met if self.left_out else ''}")
