"""Calibration and evaluation text: named data sets, local files, or text that the model itself samples."""

from __future__ import annotations

import contextlib
import logging
import random
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from .errors import UserError, explain
from .mix import FILES
from .model import SourceModel
from .recipes import Recipe
from .self_text import sample_text

logger = logging.getLogger(__name__)
UNKNOWN = "<unk>"  # in some releases of a text, WikiText's `.tokens` files for one, it stands for every rare word


def dataset_name(datasets: str) -> str:
    """Data sets as reports name them: of files, the last folder and the name, never a whole path."""
    return ",".join("/".join(Path(part).parts[-2:]) for part in datasets.split(","))


def gather_tokens(source: SourceModel, recipe: Recipe, progress: Progress) -> torch.Tensor:
    """The calibration tokens of a run, int64 [samples, seqlen]; those that are held out come last.

    Fewer rows than the recipe asks for where the data does not suffice: see `Recipe.fitted`.

    Raises:
        UserError: if the data is missing, unreadable or too short, or the model has too few positions.
    """
    check_length(source.config, recipe.seqlen, "--seqlen")
    tokenizer = source.tokenizer()
    if recipe.dataset != "self":
        with explain(f"{source.folder}: the tokenizer does not work"):
            tokens = calibration_tokens(tokenizer, recipe.dataset, recipe.windows, recipe.seqlen, recipe.seed)
        if int(tokens.max()) >= source.vocabulary:
            raise UserError(
                f"{source.folder}: the tokenizer gives token {int(tokens.max())}, the model knows {source.vocabulary}; "
                "are they of one model?"
            )
        return tokens
    return sample_text(source, recipe.windows, recipe.seqlen, recipe.seed, progress)


def check_length(config, length: int, flag: str) -> None:
    """Refuse windows that are longer than the positions of a model.

    Raises:
        UserError: naming the flag and the limit.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise UserError(f"{flag} {length}: the model has {positions} positions; lower {flag}")


def _load(*arguments: Any, **options: Any) -> Any:
    """`datasets.load_dataset` without its bars and log lines; a .txt file does without that package."""
    import datasets

    level, silent = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    datasets.logging.set_verbosity(logging.CRITICAL)  # of a damaged file it logs a traceback, and raises as well
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(*arguments, **options)
    finally:
        datasets.logging.set_verbosity(level)
        if not silent:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def reading(dataset: str) -> Iterator[None]:
    """Turn whatever goes wrong while a data set is read into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{dataset}: cannot be read without the package {error.name}: pip install {error.name}"
        ) from error
    except Exception as error:
        hint = " (an empty or damaged file?)" if Path(dataset).is_file() else "; without a network, give a local file"
        words = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{dataset}: cannot be read: {words[:300]}{hint}") from error


def load_documents(dataset: str, split: str) -> list[str]:
    """Texts of a data set.

    Args:
        dataset: `wikitext2`, `c4`, or the path of a .txt, .jsonl or .parquet file (column `text`). A .txt file is one
            document.
        split: `train` or `test`; a local file is the same for both.

    Raises:
        UserError: if the data set is unknown, unreadable or empty.
    """
    path = Path(dataset)
    with reading(dataset):
        if dataset == "wikitext2":
            rows = _load("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)["text"]
            documents = ["\n".join(row.rstrip("\n") for row in rows)]
        elif dataset == "c4":
            name = "train" if split == "train" else "validation"
            file = f"en/c4-{name}.00000-of-{'01024' if name == 'train' else '00008'}.json.gz"
            rows = _load("allenai/c4", data_files={name: file}, split=name, streaming=True)
            documents = [row["text"] for row in rows.take(4000)]
        elif path.suffix in FILES and path.is_file():
            if not path.stat().st_size:
                documents = []  # `datasets` would log a traceback
            elif FILES[path.suffix] == "text":
                documents = [path.read_text(encoding="utf-8")]
            else:
                rows = _load(FILES[path.suffix], data_files=str(path), split="train")
                if "text" not in rows.column_names:
                    raise UserError(f"{dataset}: no column 'text'; it has {rows.column_names}")
                documents = list(rows["text"])
                wrong = next((n for n, text in enumerate(documents) if not isinstance(text, str | None)), None)
                if wrong is not None:
                    raise UserError(
                        f"{dataset}: row {wrong + 1}: text is a {type(documents[wrong]).__name__}, no string"
                    )
        elif path.suffix in FILES:
            raise UserError(f"{dataset}: no such file")
        else:
            raise UserError(f"{dataset!r} is no data set: use wikitext2, c4, or a .txt, .jsonl or .parquet file")
    documents = [document for document in documents if document and document.strip()]
    if not documents:
        raise UserError(f"{dataset}: the file is empty; calibration and evaluation need text")
    return documents


def warn_of_unknown_words(dataset: str, documents: list[str]) -> None:
    """Say that a text for calibration has UNKNOWN in place of more than a thousandth of its words."""
    unknown = sum(document.count(UNKNOWN) for document in documents)
    words = sum(document.count(" ") for document in documents)
    if 1000 * unknown > words:
        hint = "calibrate on a text that has them: wikitext2 from the Hub, or the raw file"
        logger.warning("%s: %s stands for %s rare words; %s", dataset, UNKNOWN, f"{unknown:,}", hint)


def prefix_of(tokenizer) -> list[int]:
    """Tokens that the tokenizer puts in front of every text: BOS, or nothing."""
    bare, full = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    starts = [i for i in range(len(full)) if full[i : i + len(bare)] == bare]
    return full[: starts[0]] if starts else []


def cut_windows(tokenizer, text: str, length: int) -> list[list[int]]:
    """A text in consecutive windows of `length` tokens without overlap, BOS first in each where the tokenizer adds one.

    Raises:
        UserError: if `length` has no room for a token that is predicted.
    """
    prefix = prefix_of(tokenizer)
    step = length - len(prefix)
    if step < 1 or length < 2:
        raise UserError(f"windows of {length} tokens: expected at least {max(2, len(prefix) + 1)}")
    # no length limit, so no warning about one
    stream = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return [prefix + stream[start : start + step] for start in range(0, len(stream) - step + 1, step)]


def calibration_tokens(tokenizer, datasets: str, samples: int, seqlen: int, seed: int) -> torch.Tensor:
    """Windows of `seqlen` tokens from one data set, or from several in turn.

    Args:
        datasets: as for `load_documents`; several are joined by commas. One that is used up is passed over.

    Returns:
        int64 [at most samples, seqlen]; fewer rows where the data does not suffice.

    Raises:
        UserError: if a data set does not fill one window.
    """
    parts = [_windows(tokenizer, name, samples, seqlen, seed) for name in datasets.split(",")]
    turns = [row for rows in zip_longest(*parts) for row in rows if row is not None]
    return torch.tensor(turns[:samples])  # whoever asks for more samples gets these first


def _windows(tokenizer, dataset: str, samples: int, seqlen: int, seed: int) -> list[list[int]]:
    """At most `samples` windows of a data set, from shuffled documents joined end to end."""
    documents = load_documents(dataset, "train")
    warn_of_unknown_words(dataset, documents)
    shuffler = random.Random(seed)
    if len(documents) == 1:  # one long text: windows from all over it
        windows = cut_windows(tokenizer, documents[0], seqlen)
        shuffler.shuffle(windows)
    else:
        shuffler.shuffle(documents)
        windows = _packed_windows(tokenizer, documents, samples, seqlen)
    if not windows:
        raise UserError(f"{dataset}: the text does not fill one window of {seqlen} tokens; lower --seqlen")
    return windows[:samples]


def _packed_windows(tokenizer, documents: list[str], samples: int, seqlen: int) -> list[list[int]]:
    prefix = prefix_of(tokenizer)
    step, stream = seqlen - len(prefix), []
    for document in documents:
        stream += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        if len(stream) >= samples * step:
            break
    return [prefix + stream[start : start + step] for start in range(0, len(stream) - step + 1, step)]
