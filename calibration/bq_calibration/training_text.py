"""The text of end-to-end training: a mix of data sets, files and text of the model itself, as rows of tokens in a file.

Every row of the file belongs to one part of the mix, by the weights alone, and every part is a sequence of its own. So
whoever asks for more rows gets the same ones first, and each part goes on where it was interrupted.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from . import data, parallel
from .errors import UserError, explain_write
from .files import write_json
from .mix import EVALUATION, NO_FILTER, SELF, Part, parse_mix
from .model import SourceModel
from .ngrams import NGRAM, NgramFilter
from .packing import Packing
from .recipes import Recipe
from .sampling import derive_seed
from .self_text import TextWriter
from .text_source import TextSource, Unit, first_documents, open_source
from .workspace import Workspace

logger = logging.getLogger(__name__)

FOLDER = "text"  # of the workspace
ROWS = "rows.int32"  # file in it
MOST_EPOCHS = 4  # up to so many repetitions are about as good as new text (Muennighoff et al., arXiv 2305.16264)
_PIECE = 2**20  # tokens after which a part's state is written
_PREFIX_TOKENS = 8, 64  # of a real text that the model goes on with


@dataclass(frozen=True)
class MixedText:
    """Text to train on.

    Attributes:
        tokens: int32 [rows, seqlen], mapped from a file of the workspace.
        report: rows, tokens, epochs and left out documents of every part, for bq_report.json.
    """

    tokens: torch.Tensor
    report: dict[str, Any]


def check_training_text(recipe: Recipe) -> None:
    """Refuse a mix that cannot be read, before the long work in front of it; say where rare words are missing.

    Raises:
        UserError: naming the part of `--mix` or `--decontaminate`, or if nothing would be trained on it.
    """
    if recipe.mix is None:
        if recipe.decontaminate is not None:
            raise UserError("--decontaminate filters the text of --mix; give one")
        return
    if not recipe.train_tokens:
        raise UserError("--mix is the text of end-to-end training; give --train-tokens")
    for part in parse_mix(recipe.mix):
        if part.name != SELF:
            data.warn_of_unknown_words(part.name, first_documents(part.name))
    if recipe.decontaminate not in (None, NO_FILTER):
        for name in recipe.decontaminate.split(","):
            data.load_documents(name, "test")


def training_rows(
    source: SourceModel, recipe: Recipe, rows: int, workspace: Workspace, progress: Progress
) -> MixedText:
    """The first rows of the recipe's mix; those that are there already are not made again.

    Args:
        source: the 16-bit model.
        recipe: settings of the run; `mix` must be set. Text of its first `held_out` rows does not come again.
        rows: how many.
        workspace: keeps them.
        progress: shows a bar per part.

    Raises:
        UserError: if a part of the mix cannot be read or gives no text.
    """
    data.check_length(source.config, recipe.seqlen, "--seqlen")
    report = parallel.from_first(lambda: _make_rows(source, recipe, rows, workspace, progress))
    file, size = str(workspace.path / FOLDER / ROWS), rows * recipe.seqlen
    tokens = torch.from_file(file, shared=False, size=size, dtype=torch.int32).view(rows, recipe.seqlen)
    return MixedText(tokens, report)


def _make_rows(
    source: SourceModel, recipe: Recipe, rows: int, workspace: Workspace, progress: Progress
) -> dict[str, Any]:
    """Write the rows that are not there yet; the report."""
    parts = parse_mix(recipe.mix)
    owners = interleave([part.weight for part in parts], rows)
    with parallel.alone():
        mixed = _Mix(source, recipe, parts, workspace, progress)
        # text of the model comes last: it may go on with the other parts' beginnings
        for index in sorted(range(len(parts)), key=lambda index: parts[index].name == SELF):
            mixed.fill(index, np.flatnonzero(owners == index))
    return mixed.report(np.bincount(owners, minlength=len(parts)).tolist())


def interleave(weights: list[float], rows: int) -> np.ndarray:
    """The part to which each row belongs, int64 [rows]; more rows begin with the same ones.

    Row j of a part with weight w comes at time (j + 1/2) / w.
    """
    total = sum(weights)
    counts = [math.ceil(rows * weight / total) + len(weights) for weight in weights]
    times = np.concatenate([(np.arange(n) + 0.5) / weight for n, weight in zip(counts, weights, strict=True)])
    owners = np.repeat(np.arange(len(weights)), counts)
    return owners[np.argsort(times, kind="stable")[:rows]]


class _Mix:
    """The parts of a mix while their rows are written."""

    def __init__(
        self, source: SourceModel, recipe: Recipe, parts: list[Part], workspace: Workspace, progress: Progress
    ):
        self._source, self._recipe, self._parts, self._workspace = source, recipe, parts, workspace
        self._progress = progress
        self._folder = workspace.path / FOLDER
        self.file = self._folder / ROWS
        self._tokenizer = source.tokenizer()
        self._prefix = data.prefix_of(self._tokenizer)
        self._seeds = [derive_seed(recipe.seed, 1 + index) for index in range(len(parts))]
        self._states = [self._load(index) for index in range(len(parts))]
        self._sources: dict[int, TextSource] = {}
        self._filter: NgramFilter | None = None

    # ---- a part's rows

    def fill(self, index: int, places: np.ndarray) -> None:
        """Write the rows of a part that are not there yet.

        Args:
            index: of the part.
            places: rows of the file that are the part's.
        """
        state, part = self._states[index], self._parts[index]
        if state.rows >= len(places):
            return
        source, prefix = self._open(index), self._prefix if part.name != SELF else []
        held_out = int((places < self._recipe.held_out).sum())
        task = self._progress.add_task(f"text of {data.dataset_name(part.name)}", total=len(places))
        piece = source.rows if isinstance(source, _SelfText) else max(1, _PIECE // self._recipe.seqlen)
        rows = state.pack(source, part.name, prefix, self._recipe.seqlen, held_out)
        while state.rows < len(places):
            self._progress.update(task, completed=state.rows)
            wanted = places[state.rows : state.rows + piece]
            block = np.array([next(rows) for _ in wanted], dtype=np.int32)
            if block.max() >= self._source.vocabulary:
                raise UserError(
                    f"{self._source.folder}: the tokenizer gives token {block.max()}, the model knows "
                    f"{self._source.vocabulary}; are they of one model?"
                )
            self._write(wanted, block)
            write_json(self._state_file(index), asdict(state))
        self._progress.remove_task(task)
        if isinstance(source, _SelfText):
            source.close()
        if state.count and (epochs := state.epochs) > MOST_EPOCHS:
            logger.warning(
                "--mix: %s is read %.1f times; more than %d times teaches little: add text, or lower its weight",
                part.name, epochs, MOST_EPOCHS,
            )  # fmt: skip

    def _write(self, places: np.ndarray, rows: np.ndarray) -> None:
        with explain_write(self.file):
            self.file.touch()
            with open(self.file, "r+b") as file:
                for place, row in zip(places.tolist(), rows, strict=True):
                    file.seek(place * row.nbytes)
                    file.write(row.tobytes())
                file.flush()
                os.fsync(file.fileno())

    def _state_file(self, index: int) -> Path:
        return self._folder / f"part-{index}.json"

    def _load(self, index: int) -> Packing:
        file = self._state_file(index)
        return Packing(**json.loads(file.read_text())) if file.exists() else Packing()

    # ---- what the rows are made of, opened when first needed

    def _open(self, index: int) -> TextSource:
        if index not in self._sources:
            name, seed, recipe = self._parts[index].name, self._seeds[index], self._recipe
            if name == SELF:
                real = any(part.name != SELF for part in self._parts)
                writer = TextWriter.of(self._source, recipe.seqlen, seed, self._prefixes if real else None)
                self._sources[index] = _SelfText(writer, self._evaluation(), self._progress)
            else:
                window = recipe.seqlen - len(self._prefix)
                self._sources[index] = open_source(name, self._tokenizer, self._evaluation(), window, seed)
        return self._sources[index]

    def _prefixes(self, number: int, count: int) -> Iterator[list[int]]:
        """First tokens of real texts for a batch of text of the model, from the other parts by their weights."""
        chooser = random.Random(derive_seed(self._recipe.seed, 0, number))
        real = [index for index, part in enumerate(self._parts) if part.name != SELF]
        weights = [self._parts[index].weight for index in real]
        for index in chooser.choices(real, weights, k=count):
            text = self._open(index).excerpt(chooser)
            tokens = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            yield self._prefix + tokens[: chooser.randint(*_PREFIX_TOKENS)]

    def _evaluation(self) -> NgramFilter:
        """Filter of the run's evaluation texts; which ones these are is decided once."""
        if self._filter is None:
            made: list[NgramFilter] = []

            def choose() -> dict[str, Any]:
                texts, missing = _evaluation_texts(self._recipe, self._parts)
                made.append(NgramFilter(texts))
                return {"ngrams": made[0].counts, "missing": missing}

            names = self._workspace.json(f"{FOLDER}/evaluation", choose)["ngrams"]
            self._filter = made[0] if made else NgramFilter({name: data.load_documents(name, "test") for name in names})
        return self._filter

    # ---- the report

    def report(self, rows: list[int]) -> dict[str, Any]:
        """The report of all parts, of which so many rows each are used."""
        label = data.dataset_name
        evaluation = json.loads((self._folder / "evaluation.json").read_text())
        parts = []
        for part, state, count in zip(self._parts, self._states, rows, strict=True):
            report = {"name": label(part.name), "weight": part.weight, "rows": count}
            report["tokens"] = count * self._recipe.seqlen
            report["epochs"] = state.epochs
            report["left_out"] = {label(name): number for name, number in sorted(state.left_out.items())}
            parts.append(report)
        return {
            "parts": parts,
            "left_out_by": f"{NGRAM} words in a row, of documents, lines of long texts, or windows of the model's text",
            "evaluation_texts": {label(name): count for name, count in evaluation["ngrams"].items()},
            "evaluation_texts_missing": evaluation["missing"],
        }


class _SelfText:
    """Text of the model itself as a source without end, whose units are whole rows."""

    count = None

    def __init__(self, writer: TextWriter, evaluation: NgramFilter, progress: Progress):
        self.rows, self._writer, self._evaluation, self._progress = writer.rows, writer, evaluation, progress
        self.close = writer.close

    def units(self, epoch: int, start: int) -> Iterator[Unit]:
        for number in itertools.count(start // self.rows):
            for place, row in enumerate(self._writer.write(number, self._progress).tolist(), number * self.rows):
                if place >= start:
                    met = self._evaluation.met(self._writer.tokenizer.decode(row, skip_special_tokens=True))
                    yield Unit(place, [] if met else row, met)


def _evaluation_texts(recipe: Recipe, parts: list[Part]) -> tuple[dict[str, list[str]], list[str]]:
    """Evaluation texts to keep out of a mix, and the names of those that are not at hand.

    By default those of `bq-eval` where the mix takes text from the Hub: other text needs no network, and should not.

    Raises:
        UserError: if one that the user names cannot be read.
    """
    if recipe.decontaminate == NO_FILTER:
        return {}, []
    if recipe.decontaminate is not None:
        return {name: data.load_documents(name, "test") for name in recipe.decontaminate.split(",")}, []
    texts, missing = {}, []
    for name in EVALUATION if any(part.on_hub for part in parts) else ():
        try:
            texts[name] = data.load_documents(name, "test")
        except UserError as error:
            missing.append(name)
            logger.warning("training text is not compared with the evaluation text %s: %s", name, error)
    return texts, missing
