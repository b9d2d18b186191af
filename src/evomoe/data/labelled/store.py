"""Labelled sentences encoded once into arrays of token ids.

meta.json                                            also the classes, and whether rows are pairs
train.ids.npy  val.ids.npy  test.ids.npy             the ids of first, second, first, ... without any marker
train.ends.npy  val.ends.npy  test.ends.npy          where each of them ends, (N, 2) int64
train.labels.npy  val.labels.npy  test.labels.npy    (N,) int64, or float32 where labels are numbers
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.progress import Progress

from evomoe.data.cache import save_array
from evomoe.data.corpus import SPLITS
from evomoe.data.encoding import id_dtype
from evomoe.data.labelled.corpus import LabelledCorpus, Row
from evomoe.data.store import Store
from evomoe.data.tokenizer import Tokenizer
from evomoe.data.two_sided import both_sides, encode, read_ahead, side_lengths, train_tokenizer
from evomoe.errors import ConfigError

_MOST_CLASSES = 1000
_MOST_FRACTIONS = 20
"""Classes beyond which labels such as 3.25 are taken for numbers, as the scores of STS-B are."""


@dataclass(frozen=True)
class EncodedRows:
    """The rows of a split, in memory.

    Args:
        ids: Token ids of all sentences, one after the other.
        ends: Where the first and the second sentence of each row end, ``(N, 2)``; equal without a second.
        labels: ``(N,)`` int64 classes, or float32 numbers.
    """

    ids: np.ndarray
    ends: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[list[int], list[int]]:
        """Return the ids of the first and of the second sentence of a row."""
        first, second = both_sides(self.ids, self.ends, index)
        return first.tolist(), second.tolist()

    def lengths(self) -> np.ndarray:
        """Return the numbers of ids of both sentences of each row, ``(N, 2)``."""
        return side_lengths(self.ends)


class LabelledStore(Store):
    """The encoded splits of a labelled corpus, see :class:`~evomoe.data.store.Store`.

    Its option is `regression`, whether labels are numbers.
    """

    format: ClassVar[dict[str, int]] = {"labelled_store_format": 1}

    def _open(self, meta: dict[str, Any]) -> None:
        self.classes: list[str] | None = meta["classes"]
        self.pairs: bool = meta["pairs"]
        self.rows = {
            split: EncodedRows(
                *(np.load(self._directory / f"{split}.{part}.npy") for part in ("ids", "ends", "labels"))
            )
            for split in SPLITS
        }
        for split, rows in self.rows.items():
            if rows.ends.shape != (len(rows), 2) or rows.ends[-1, 1] != len(rows.ids):
                raise ValueError(f"{split}.*.npy do not belong together")

    @classmethod
    def _fill(
        cls,
        draft: Path,
        progress: Progress,
        corpus: LabelledCorpus,
        vocab_size: int,
        tokenizer: Tokenizer | None,
        *,
        regression: bool = False,
    ) -> tuple[Tokenizer, dict[str, Any]]:
        classes = None if regression else _classes(corpus, progress)
        numbers = None if classes is None else {name: number for number, name in enumerate(classes)}
        read_ahead(corpus, progress, lambda row: _label(row, numbers))
        if tokenizer is None:
            tokenizer = train_tokenizer(corpus, vocab_size, progress)
        pairs = {}
        for split in SPLITS:
            encoded = _encode(corpus.items(split, progress), tokenizer, numbers)
            if len(encoded) == 0:
                raise ConfigError(corpus.explain_empty(split))
            for part in ("ids", "ends", "labels"):
                save_array(draft / f"{split}.{part}.npy", getattr(encoded, part))
            pairs[split] = bool((encoded.lengths()[:, 1] > 0).any())
        return tokenizer, {"classes": classes, "pairs": pairs["train"]}


def order_classes(labels: set[str], given: list[str] | None = None) -> list[str]:
    """Return the classes in order: as given, or else by value if all are finite numbers, or else by name.

    Args:
        labels: Names of the classes.
        given: An order of these, and perhaps of more; None if the data have none.
    """
    if given is not None:
        return [name for name in given if name in labels]
    names = sorted(labels)
    values = _finite(names)
    return names if values is None else [name for _, name in sorted(zip(values, names, strict=True))]


def _classes(corpus: LabelledCorpus, progress: Progress) -> list[str]:
    found = {row.label for row in corpus.items("train", progress)}
    classes = order_classes(found, corpus.classes())
    if not classes:
        raise ConfigError(corpus.explain_empty("train"))
    if len(classes) == 1:
        raise ConfigError(f"all rows of data.train have the label {classes[0]!r}: there is nothing to tell apart")
    if len(classes) > _MOST_CLASSES or (len(classes) > _MOST_FRACTIONS and _are_fractions(classes)):
        raise ConfigError(
            f"data.train has {len(classes):,} different labels, as numbers have: set data.regression=true, name "
            "another column with data.label=..., or write classes as words, such as v3.8"
        )
    return classes


def _are_fractions(labels: Iterable[str]) -> bool:
    """Whether all labels are finite numbers, and some of them not whole."""
    values = _finite(labels)
    return values is not None and not all(value.is_integer() for value in values)


def _finite(labels: Iterable[str]) -> list[float] | None:
    """The labels as numbers; None if one is none, or not finite."""
    try:
        values = [float(label) for label in labels]
    except ValueError:
        return None
    return values if all(map(math.isfinite, values)) else None


def _encode(rows: Iterator[Row], tokenizer: Tokenizer, numbers: dict[str, int] | None) -> EncodedRows:
    dtype = id_dtype(tokenizer)
    ids = [np.zeros(0, dtype)]
    labels: list[float] = []

    def sentences() -> Iterator[tuple[str, str]]:
        for row in rows:
            labels.append(_label(row, numbers))
            yield row.first, row.second or ""

    ends = encode(sentences(), tokenizer, dtype, ids.append)
    return EncodedRows(np.concatenate(ids), ends, np.asarray(labels, np.int64 if numbers else np.float32))


def _label(row: Row, numbers: dict[str, int] | None) -> float:
    if numbers is not None:
        if row.label not in numbers:
            known = ", ".join(list(numbers)[:10]) + (", ..." if len(numbers) > 10 else "")
            numeric = "; for numbers set data.regression=true" if _are_fractions([row.label, *numbers]) else ""
            raise ConfigError(
                f"{row.place}: the label {row.label!r} is none of the classes of data.train ({known}){numeric}"
            )
        return numbers[row.label]
    try:
        value = float(row.label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{row.place}: the label {row.label!r} is no number; for classes set data.regression=false")
    return value
