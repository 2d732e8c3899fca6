"""Where training text comes from: long texts, files of documents and streams of the Hub, shuffled anew in every epoch.

Each source gives units of text in an order that seed and epoch decide, from any place in it, so that a run which was
interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from . import data
from .errors import UserError
from .mix import FILES
from .ngrams import NgramFilter
from .sampling import derive_seed

_BATCH = 256  # documents that are tokenised together
_PIECE = 2**18  # characters of a long text that are tokenised together
_SHUFFLED = 10_000  # documents of a stream that are in memory and shuffled
_FIRST = 1000  # documents that stand for all of a stream
_EXCERPT = 600  # characters, of 64 tokens more often than not


@dataclass(frozen=True)
class Unit:
    """A document, or a window of a long text.

    Attributes:
        key: by which it is known again in another epoch.
        tokens: none of a document that is left out.
        met: the evaluation text for which it is left out.
    """

    key: int
    tokens: list[int]
    met: str | None = None


class TextSource(Protocol):
    """A source of units.

    Attributes:
        count: units per epoch; None where only the end will tell.
    """

    count: int | None

    def units(self, epoch: int, start: int) -> Iterator[Unit]:
        """The units of an epoch, from a place in its order on."""
        ...

    def excerpt(self, chooser: random.Random) -> str:
        """Some words from anywhere in the text."""
        ...


def open_text(name: str) -> Any:
    """A data set for training as it is stored: a text, or rows with a column `text`, streamed from the Hub.

    Args:
        name: a name in `--mix` other than `self`.

    Raises:
        UserError: if it cannot be read or has no text.
    """
    path = Path(name)
    with data.reading(name):
        if name == "wikitext2" or FILES.get(path.suffix) == "text":
            return data.load_documents(name, "train")[0]
        if path.suffix in FILES:
            if not path.stat().st_size:
                raise UserError(f"{name}: the file is empty; training needs text")
            rows = data._load(FILES[path.suffix], data_files=str(path), split="train")
            columns = {column: str(getattr(kind, "dtype", kind)) for column, kind in rows.features.items()}
            if columns.get("text") not in ("string", "large_string"):
                raise UserError(f"{name}: no column 'text' of strings; it has {columns}")
            return rows if len(rows) > 1 else rows[0]["text"]
        if name == "c4":
            rows = data._load("allenai/c4", "en", split="train", streaming=True)
        else:
            organization, repository, *config = name.split("/")
            rows = data._load(f"{organization}/{repository}", *config, split="train", streaming=True)
        first = next(iter(rows), {})
        if not isinstance(first.get("text"), str):
            raise UserError(f"{name}: no column 'text' of strings; it has {list(first)}")
        return rows


def first_documents(name: str) -> list[str]:
    """The text of a data set for training, or the first documents of many.

    Args:
        name: as for `open_text`.

    Raises:
        UserError: if it cannot be read or has no text.
    """
    opened = open_text(name)
    return [opened] if isinstance(opened, str) else _first_of(name, opened)


def _first_of(name: str, rows: Any) -> list[str]:
    with data.reading(name):
        return [row["text"] or "" for row in islice(rows, _FIRST)]


def open_source(name: str, tokenizer, evaluation: NgramFilter, window: int, seed: int) -> TextSource:
    """The source of a data set.

    Args:
        name: as for `open_text`.
        tokenizer: makes tokens of it.
        evaluation: texts with which nothing may share a run of words.
        window: tokens per window of a long text.
        seed: of its order.

    Raises:
        UserError: if it cannot be read or does not fill a window.
    """
    opened = open_text(name)
    if isinstance(opened, str):
        return _LongText(name, opened, tokenizer, evaluation, window, seed)
    if hasattr(opened, "__len__"):
        return _Rows(name, opened, tokenizer, evaluation, seed)
    return _Stream(name, opened, tokenizer, evaluation, seed)


def _key(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=6).digest(), "big")


def _excerpt(text: str, chooser: random.Random) -> str:
    begin = chooser.randrange(max(1, len(text) - _EXCERPT))
    words = text[begin : begin + _EXCERPT]
    return words if begin == 0 else words.partition(" ")[2]


def _pieces(lines: list[str]) -> Iterator[str]:
    """A text by its lines, in pieces: a tokenizer takes some 200 bytes per character while it works."""
    sizes = np.cumsum([len(line) + 1 for line in lines]) // _PIECE
    for _, group in groupby(zip(sizes, lines, strict=True), key=lambda pair: pair[0]):
        yield "".join(f"{line}\n" for _, line in group)


class _LongText:
    """One text in windows without overlap; lines that share a run of words with an evaluation text are cut out."""

    def __init__(self, name: str, text: str, tokenizer, evaluation: NgramFilter, window: int, seed: int):
        kept, self._cut = [], []
        for line in text.split("\n"):
            met = evaluation.met(line)
            if met is None:
                kept.append(line)
            else:
                self._cut.append(Unit(-1 - len(self._cut), [], met))
        self._text, self._seed = "\n".join(kept), seed
        encoded = [tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in _pieces(kept)]
        tokens = np.concatenate([np.array(ids, dtype=np.int32) for ids in encoded])
        self._windows = tokens[: len(tokens) // window * window].reshape(-1, window)
        if not len(self._windows):
            raise UserError(f"--mix {name}: the text does not fill one window of {window} tokens; lower --seqlen")
        self.count = len(self._cut) + len(self._windows)

    def units(self, epoch: int, start: int) -> Iterator[Unit]:
        order = np.random.default_rng(derive_seed(self._seed, epoch)).permutation(len(self._windows))
        yield from self._cut[start:]
        for number in order[max(0, start - len(self._cut)) :].tolist():
            yield Unit(number, self._windows[number].tolist())

    def excerpt(self, chooser: random.Random) -> str:
        return _excerpt(self._text, chooser)


class _Documents:
    """Documents, each known by a hash of its text."""

    def __init__(self, name: str, tokenizer, evaluation: NgramFilter):
        self._name, self._tokenizer, self._evaluation = name, tokenizer, evaluation

    def _units(self, batches: Iterator[list[str | None]]) -> Iterator[Unit]:
        while True:
            with data.reading(self._name):  # a stream may break off
                texts = [text or "" for text in next(batches, [])]
            if not texts:
                return
            met = [self._evaluation.met(text) for text in texts]
            kept = ["" if found else text for text, found in zip(texts, met, strict=True)]
            tokens = self._tokenizer(kept, add_special_tokens=False, verbose=False)["input_ids"]
            yield from map(Unit, map(_key, texts), tokens, met)


class _Rows(_Documents):
    """A file of documents, read where they lie."""

    def __init__(self, name: str, rows: Any, tokenizer, evaluation: NgramFilter, seed: int):
        super().__init__(name, tokenizer, evaluation)
        self._rows, self._seed, self.count = rows, seed, len(rows)

    def units(self, epoch: int, start: int) -> Iterator[Unit]:
        order = np.random.default_rng(derive_seed(self._seed, epoch)).permutation(self.count)
        return self._units(self._rows[order[at : at + _BATCH]]["text"] for at in range(start, self.count, _BATCH))

    def excerpt(self, chooser: random.Random) -> str:
        return _excerpt(self._rows[chooser.randrange(self.count)]["text"] or "", chooser)


class _Stream(_Documents):
    """A stream of documents, shuffled through a buffer; to go on in it, what stands in front is read once more."""

    def __init__(self, name: str, rows: Any, tokenizer, evaluation: NgramFilter, seed: int):
        super().__init__(name, tokenizer, evaluation)
        self._rows, self._seed, self.count = rows, seed, None
        self._excerpted: list[str] = []

    def units(self, epoch: int, start: int) -> Iterator[Unit]:
        shuffled = self._rows.shuffle(seed=derive_seed(self._seed, epoch), buffer_size=_SHUFFLED).skip(start)
        texts = (row["text"] for row in shuffled)
        return self._units(iter(lambda: list(islice(texts, _BATCH)), []))

    def excerpt(self, chooser: random.Random) -> str:
        if not self._excerpted:
            self._excerpted = _first_of(self._name, self._rows)
        return _excerpt(chooser.choice(self._excerpted), chooser)
