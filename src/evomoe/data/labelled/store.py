"""Labelled sentences encoded once into arrays of token ids.

<cache_dir>/<fingerprint>/
    meta.json         identity, classes, and notes of the reading
    tokenizer.json
    train.ids.npy  val.ids.npy  test.ids.npy             the ids of first, second, first, ... without any marker
    train.ends.npy  val.ends.npy  test.ends.npy          where each of them ends, (N, 2) int64
    train.labels.npy  val.labels.npy  test.labels.npy    (N,) int64, or float32 where labels are numbers
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from evomoe.data.cache import build_folder
from evomoe.data.corpus import SPLITS
from evomoe.data.encoding import encoding_of, id_dtype
from evomoe.data.labelled.corpus import LabelledCorpus, Row
from evomoe.data.tokenizer import Tokenizer
from evomoe.errors import ConfigError

_FORMAT = 1
_ROWS_AT_ONCE = 10_000  # that are encoded at once
_MOST_CLASSES = 1000


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
        start = self.ends[index - 1, 1] if index else 0
        middle, end = self.ends[index]
        return self.ids[start:middle].tolist(), self.ids[middle:end].tolist()

    def lengths(self) -> np.ndarray:
        """Return the numbers of ids of both sentences of each row, ``(N, 2)``."""
        return np.diff(self.ends.reshape(-1), prepend=0).reshape(-1, 2)


class LabelledStore:
    """The encoded splits of a labelled corpus, with their tokenizer.

    Args:
        directory: A folder that `LabelledStore.build` made.

    Raises:
        ConfigError: A file is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        try:
            meta = json.loads((directory / "meta.json").read_text())
            self.tokenizer = Tokenizer.from_json((directory / "tokenizer.json").read_text())
            self.identity: dict[str, Any] = meta["identity"]
            self.classes: list[str] | None = meta["classes"]
            self.pairs: bool = meta["pairs"]
            self.notes: dict[str, int] = meta["notes"]
            self.rows = {
                split: EncodedRows(*(np.load(directory / f"{split}.{part}.npy") for part in ("ids", "ends", "labels")))
                for split in SPLITS
            }
            for split, rows in self.rows.items():
                if rows.ends.shape != (len(rows), 2) or rows.ends[-1, 1] != len(rows.ids):
                    raise ValueError(f"{split}.*.npy do not belong together")
        except (OSError, ValueError, EOFError) as error:
            raise ConfigError(
                f"the data cache {directory} is damaged ({error}); delete the folder to rebuild"
            ) from error

    @staticmethod
    def identity_of(
        corpus: LabelledCorpus, vocab_size: int, tokenizer: Tokenizer | None = None, *, regression: bool = False
    ) -> dict[str, Any]:
        """Return the plain values from which the content of a store follows; their fingerprint names its folder."""
        encoding = encoding_of(vocab_size, tokenizer)
        return {"labelled_store_format": _FORMAT, "regression": regression, **encoding, **corpus.identity()}

    @staticmethod
    def build(
        corpus: LabelledCorpus,
        vocab_size: int,
        cache_dir: Path,
        tokenizer: Tokenizer | None = None,
        *,
        regression: bool = False,
    ) -> Path:
        """Encode the rows, with a tokenizer trained on them unless one is given, unless the cache holds them already.

        Args:
            corpus: The rows.
            vocab_size: Largest number of tokens of a tokenizer that is trained on them.
            cache_dir: Folder of all caches.
            tokenizer: One that is given; None trains one.
            regression: Whether labels are numbers.

        Returns:
            The folder of the store.

        Raises:
            ConfigError: A label cannot be, a split holds no row, the vocabulary is too small, or `cache_dir` cannot be
                written.
        """
        identity = LabelledStore.identity_of(corpus, vocab_size, tokenizer, regression=regression)

        def write(draft: Path, progress: Progress) -> None:
            _write(draft, progress, corpus, tokenizer or _train(corpus, vocab_size, progress), identity)

        return build_folder(cache_dir, identity, write)


def order_classes(labels: set[str], given: list[str] | None = None) -> list[str]:
    """Return the classes in order: as given, or else by value if all are numbers, or else by name.

    Args:
        labels: Names of the classes.
        given: An order of these, and perhaps of more; None if the data have none.
    """
    if given is not None:
        return [name for name in given if name in labels]
    try:
        return sorted(labels, key=float)
    except ValueError:
        return sorted(labels)


def _train(corpus: LabelledCorpus, vocab_size: int, progress: Progress) -> Tokenizer:
    rows = corpus.rows("train", progress)
    return Tokenizer.train((text for row in rows for text in (row.first, row.second) if text), vocab_size)


def _write(
    draft: Path, progress: Progress, corpus: LabelledCorpus, tokenizer: Tokenizer, identity: dict[str, Any]
) -> None:
    classes = None if identity["regression"] else _classes(corpus, progress)
    (draft / "tokenizer.json").write_text(tokenizer.to_json())
    kinds = {}
    for split in SPLITS:
        rows = corpus.rows(split, progress)
        encoded = _encode(rows, tokenizer, classes)
        if len(encoded) == 0:
            raise ConfigError(corpus.explain_empty(split))
        for part in ("ids", "ends", "labels"):
            np.save(draft / f"{split}.{part}.npy", getattr(encoded, part))
        kinds[split] = bool((encoded.lengths()[:, 1] > 0).any())
    meta = {"identity": identity, "classes": classes, "pairs": kinds["train"], "notes": corpus.notes()}
    (draft / "meta.json").write_text(json.dumps(meta, indent=2))


def _classes(corpus: LabelledCorpus, progress: Progress) -> list[str]:
    found = {row.label for row in corpus.rows("train", progress)}
    classes = order_classes(found, corpus.classes())
    if not classes:
        raise ConfigError(corpus.explain_empty("train"))
    if len(classes) == 1:
        raise ConfigError(f"all rows of data.train have the label {classes[0]!r}: there is nothing to tell apart")
    if len(classes) > _MOST_CLASSES:
        raise ConfigError(
            f"data.train has {len(classes):,} different labels, as numbers have: set data.regression=true, or name "
            "another column with data.label=..."
        )
    return classes


def _encode(rows: Iterator[Row], tokenizer: Tokenizer, classes: list[str] | None) -> EncodedRows:
    numbers = None if classes is None else {name: number for number, name in enumerate(classes)}
    ids: list[np.ndarray] = [np.zeros(0, id_dtype(tokenizer))]
    lengths: list[int] = []  # of first, second, first, ...
    labels: list[float] = []
    while chunk := list(islice(rows, _ROWS_AT_ONCE)):
        labels += [_label(row, numbers) for row in chunk]
        encoded = tokenizer.encode_batch([text or "" for row in chunk for text in (row.first, row.second)])
        lengths += map(len, encoded)
        ids.append(np.asarray([token for sentence in encoded for token in sentence], dtype=ids[0].dtype))
    ends = np.cumsum(lengths, dtype=np.int64).reshape(-1, 2)
    return EncodedRows(np.concatenate(ids), ends, np.asarray(labels, np.int64 if numbers else np.float32))


def _label(row: Row, numbers: dict[str, int] | None) -> float:
    if numbers is not None:
        if row.label not in numbers:
            known = ", ".join(list(numbers)[:10]) + (", ..." if len(numbers) > 10 else "")
            raise ConfigError(f"{row.place}: the label {row.label!r} is none of the classes of data.train ({known})")
        return numbers[row.label]
    try:
        value = float(row.label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ConfigError(f"{row.place}: the label {row.label!r} is no number; for classes set data.regression=false")
    return value
