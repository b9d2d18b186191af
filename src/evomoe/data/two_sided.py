"""What corpora of items with two texts share, pairs of sentences and rows of one sentence or two.

The ids of N items lie one after the other, those of the first text of an item, of its second, of the first of the next
item, without any marker. `ends (N, 2)` says where the first and the second text of each item end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from rich.progress import Progress

from evomoe.data.corpus import SPLITS, ItemCorpus
from evomoe.data.encoding import TokenFile
from evomoe.data.tokenizer import Sample, Tokenizer
from evomoe.errors import ConfigError

_ITEMS_AT_ONCE = 10_000  # that are encoded at once
_TOO_LONG = ("truncate", "drop")


def read_ahead(corpus: ItemCorpus[Any], progress: Progress, check: Callable[[Any], object] | None = None) -> None:
    """Read the splits that are given for evaluations, so that what is wrong with them is said before the long work.

    Args:
        corpus: The items.
        progress: Where the reading is shown.
        check: Refuses an item.

    Raises:
        ConfigError: A split is empty, or cannot be read to its end.
    """
    for split in SPLITS[1:]:
        if split in corpus.held_out:
            continue
        empty = True
        for item in corpus.items(split, progress):
            empty = False
            if check is not None:
                check(item)
        if empty:
            raise ConfigError(corpus.explain_empty(split))


def train_tokenizer(corpus: ItemCorpus[Any], vocab_size: int, progress: Progress) -> Tokenizer:
    """Learn the merges from an even sample of the training items, of which each is whole.

    Args:
        corpus: The items.
        vocab_size: Largest number of tokens.
        progress: Where the reading is shown.
    """
    sample = Sample()
    for item in corpus.items("train", progress):
        sample.add(*corpus.texts(item))
    return Tokenizer.train(sample.texts, vocab_size)


def encode(
    items: Iterable[tuple[str, str]], tokenizer: Tokenizer, dtype: str, write: Callable[[np.ndarray], object]
) -> np.ndarray:
    """Encode the texts of items.

    Args:
        items: Both texts of each, the second one empty if there is none.
        tokenizer: What encodes them.
        dtype: Name of the integer type of an id.
        write: Takes the ids, some thousand items at once.

    Returns:
        Where the texts end, ``(N, 2)`` int64.
    """
    remaining = iter(items)
    lengths: list[int] = []  # of first, second, first, ...
    while chunk := list(islice(remaining, _ITEMS_AT_ONCE)):
        encoded = tokenizer.encode_batch([text for item in chunk for text in item])
        lengths += map(len, encoded)
        write(np.asarray([token for ids in encoded for token in ids], dtype=dtype))
    return np.cumsum(lengths, dtype=np.int64).reshape(-1, 2)


def both_sides(ids: np.ndarray | TokenFile, ends: np.ndarray, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the ids of the first and of the second text of an item.

    Args:
        ids: Of all items.
        ends: ``(N, 2)``.
        index: Number of the item.
    """
    start = ends[index - 1, 1] if index else 0
    middle, end = ends[index]
    return ids[start:middle], ids[middle:end]


def side_lengths(ends: np.ndarray) -> np.ndarray:
    """Return the numbers of ids of both texts of each item, ``(N, 2)``, from where they end, ``(N, 2)``."""
    return np.diff(ends.reshape(-1), prepend=0).reshape(-1, 2)


@dataclass(frozen=True)
class ContextLimit:
    """The most tokens of an item, and what becomes of training items that have more; evaluations cut them.

    Args:
        context: Most tokens.
        too_long: Whether a training item of more is cut (`truncate`) or left out (`drop`).

    Raises:
        ConfigError: `too_long` is unknown.
    """

    context: int
    too_long: str

    def __post_init__(self) -> None:
        if self.too_long not in _TOO_LONG:
            raise ConfigError(
                f"data.too_long={self.too_long} is unknown; use data.too_long=truncate or data.too_long=drop"
            )

    def training_items(self, lengths: np.ndarray, kind: str) -> np.ndarray:
        """Return the numbers of the items to train on, ascending.

        Args:
            lengths: Tokens of each training item, ``(N,)``.
            kind: What an item is, for the message.

        Raises:
            ConfigError: None is left.
        """
        if self.too_long == "truncate":
            return np.arange(len(lengths))
        kept = np.flatnonzero(lengths <= self.context)
        if len(kept) == 0:
            raise ConfigError(
                f"data.too_long=drop leaves no training {kind}: all are longer than data.context={self.context}"
            )
        return kept

    def describe(self, lengths: Mapping[str, np.ndarray]) -> str:
        """Return for the log how many items are too long, and what becomes of them; empty if none is.

        Args:
            lengths: Tokens of each item, ``(N,)``, by split.
        """
        notes = ""
        for split, of_split in lengths.items():
            if count := int((of_split > self.context).sum()):
                fate = "left out" if split == "train" and self.too_long == "drop" else "cut"
                notes += f", {count:,} of {split} longer than data.context={self.context}: {fate}"
        return notes
