"""Keeping evaluation texts out of training: documents that share a run of words with one are found by hashes."""

from __future__ import annotations

import re

import numpy as np

NGRAM = 13  # words: the rule of GPT-3 (Brown et al., arXiv 2005.14165, appendix C)
_WORD = re.compile(r"\w+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no product loses bits


def ngram_hashes(text: str) -> np.ndarray:
    """A hash of every run of NGRAM words of a text, uint64; words without case and punctuation.

    Hashes are those of this process: Python seeds the hashes of words anew in each.
    """
    words = np.array(list(map(hash, _WORD.findall(text.lower()))), dtype=np.int64).view(np.uint64)
    count = max(0, len(words) - NGRAM + 1)
    hashes = np.zeros(count, dtype=np.uint64)
    for place in range(NGRAM if count else 0):
        hashes *= _FACTOR
        hashes += words[place : place + count]
    return hashes


class NgramFilter:
    """Finds texts that share a run of NGRAM words with an evaluation text.

    Args:
        texts: documents of every evaluation text, by its name.

    Attributes:
        counts: different runs of words by evaluation text; one that several have counts for the first.
    """

    def __init__(self, texts: dict[str, list[str]]):
        self._names = list(texts)
        hashes = [[ngram_hashes(document) for document in documents] for documents in texts.values()]
        owners = [np.full(sum(map(len, of_text)), owner) for owner, of_text in enumerate(hashes)]
        every = np.concatenate([part for of_text in hashes for part in of_text] or [np.zeros(0, np.uint64)])
        self._hashes, first = np.unique(every, return_index=True)
        self._owners = np.concatenate(owners or [np.zeros(0, np.int64)])[first]
        self.counts = {name: int((self._owners == owner).sum()) for owner, name in enumerate(self._names)}

    def met(self, text: str) -> str | None:
        """Name of the evaluation text with which a text shares a run of words, or None."""
        if not len(self._hashes):
            return None
        hashes = ngram_hashes(text)
        places = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        found = np.flatnonzero(self._hashes[places] == hashes)
        return self._names[self._owners[places[found[0]]]] if len(found) else None
