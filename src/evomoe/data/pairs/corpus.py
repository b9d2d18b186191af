"""Parallel corpora: sentence pairs in two languages, from the user's files or from public data sets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from itertools import zip_longest
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import Progress

from evomoe.data.corpus import SPLITS, HoldOut, ItemCorpus, track
from evomoe.data.hub import HubDataset, load_datasets
from evomoe.data.text.files import digest, lines, refuse_overlap
from evomoe.errors import ConfigError


class Pair(NamedTuple):
    """A sentence and its translation, without line ends."""

    source: str
    target: str


class PairCorpus(ItemCorpus[Pair]):
    """Sentence pairs in three splits, `train`, `val` and `test`.

    Args:
        source: Language that is translated from.
        target: Language that is translated to.
    """

    contents = "pair of sentences"
    remedy = "give files with text"
    left_out = "pairs"

    def __init__(self, source: str, target: str) -> None:
        if source == target:
            raise ConfigError(f"data.source={source} and data.target={target} are one language: give two")
        self.source = source
        self.target = target

    def texts(self, item: Pair) -> Iterable[str]:
        """Return source and target."""
        return item


class ParallelFiles(PairCorpus):
    """Pairs of text files, line by line: `data.train=multi30k/train` reads `multi30k/train.de` and `.en`, or `.gz`.

    Args:
        source: Ending of the files of the source language.
        target: Ending of the files of the target language.
        train: Path of the training files without their endings.
        val: The same for validation; None holds validation pairs out of `train`.
        test: The same for the test; None holds test pairs out of `train`.
        holdout: Share of the training pairs that is held out for each missing split.

    Raises:
        ConfigError: A file does not exist.
    """

    def __init__(
        self,
        source: str,
        target: str,
        train: str,
        val: str | None = None,
        test: str | None = None,
        holdout: float = 0.05,
    ) -> None:
        super().__init__(source, target)
        given = {"train": train, "val": val, "test": test}
        self._files = {
            split: (_find(split, stem, source, "source"), _find(split, stem, target, "target"))
            for split, stem in given.items()
            if stem is not None
        }
        self._holdout = HoldOut([split for split in SPLITS if split not in self._files], holdout, "PATH")

    def identity(self) -> dict[str, Any]:
        """Return the digests of the files' contents: moving or renaming a file changes nothing."""
        return {
            "corpus": "parallel_files",
            "corpus_format": 2,
            "source": self.source,
            "target": self.target,
            "holdout": self._holdout.identity,
            "files": self._digests,
        }

    @cached_property
    def _digests(self) -> dict[str, list[str]]:
        digests = {split: [digest(file) for file in files] for split, files in self._files.items()}
        names = {split: f"{source} with {target}" for split, (source, target) in self._files.items()}
        refuse_overlap({split: [(names[split], " ".join(pair))] for split, pair in digests.items()})
        return digests

    def _read(self, split: str, progress: Progress) -> Iterator[Pair]:
        return self._holdout.read(split, partial(self._lines, progress=progress), attrgetter("source"))

    def _lines(self, split: str, progress: Progress) -> Iterator[Pair]:
        files = self._files[split]
        rows = zip_longest(*(lines(file) for file in files))
        for source, target in track(progress, rows, None, f"reading {split}"):
            if source is None or target is None:
                counts = [sum(1 for _ in lines(file)) for file in files]
                raise ConfigError(
                    f"data.{split}: {files[0]} has {counts[0]} lines and {files[1]} has {counts[1]}; line n of one "
                    "must be the translation of line n of the other"
                )
            yield Pair(source.rstrip("\r\n"), target.rstrip("\r\n"))


class HubPairs(PairCorpus):
    """A data set of the Hub, or a local folder of JSON, Parquet or CSV files, with a column for each language.

    A column `translation` that holds all languages of a row, as those of WMT and OPUS do, is looked into; one that is
    text is a column like any other.

    Args:
        source: Column, or key of `translation`, of the source language.
        target: The same of the target language.
        name: Name on the Hub, or path of a folder.
        config: Configuration of the data set, such as `de-en`.
        train: Name of its training split.
        val: Name of its validation split; None holds validation pairs out of `train`.
        test: Name of its test split; None holds test pairs out of `train`.
        holdout: Share of the training pairs that is held out for each missing split.

    Raises:
        ConfigError: `datasets` is not installed, or the data set, a split or a language does not exist.
    """

    def __init__(
        self,
        source: str,
        target: str,
        name: str,
        config: str | None = None,
        train: str = "train",
        val: str | None = "validation",
        test: str | None = "test",
        holdout: float = 0.05,
    ) -> None:
        super().__init__(source, target)
        self._hub = HubDataset(name, config, train, val, test)
        self._holdout = HoldOut(self._hub.missing, holdout, "SPLIT")

    def identity(self) -> dict[str, Any]:
        """Return the options and the hash that `datasets` gives this revision of the data."""
        return {
            "corpus": "hub_pairs",
            "corpus_format": 1,
            "source": self.source,
            "target": self.target,
            **self._hub.identity(),
            "holdout": self._holdout.identity,
        }

    def _read(self, split: str, progress: Progress) -> Iterator[Pair]:
        return self._holdout.read(split, partial(self._rows, progress=progress), attrgetter("source"))

    def _rows(self, split: str, progress: Progress) -> Iterator[Pair]:
        table = self._hub.table(split)
        column = table.features.get("translation")
        nested = column is not None and not isinstance(column, load_datasets().Value)
        for row in track(progress, table, len(table), f"reading {split}"):
            texts = (row["translation"] or {}) if nested else row
            for key, language in (("source", self.source), ("target", self.target)):
                if texts and not isinstance(texts.get(language, 0), str | None):
                    known = ", ".join(texts)
                    raise ConfigError(f"data.{key}={language} is no language of {self._hub.name}; choose among {known}")
            # What is null counts as blank. A line feed inside a sentence would be read as its end when translations
            # are written line by line.
            source, target = (" ".join((texts.get(own) or "").split("\n")) for own in (self.source, self.target))
            yield Pair(source, target)


def _find(split: str, stem: str, language: str, key: str) -> Path:
    candidates = [Path(f"{stem}.{language}{suffix}").expanduser() for suffix in ("", ".gz")]
    for path in candidates:
        if path.is_file():
            return path
    names = " nor ".join(map(str, candidates))
    raise ConfigError(
        f"data.{split}={stem} and data.{key}={language}: there is neither {names} (seen from {Path.cwd()})"
    )
