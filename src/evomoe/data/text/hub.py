"""Text of public data sets by name."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from rich.progress import Progress

from evomoe.data.corpus import HoldOut, track
from evomoe.data.hub import HubDataset
from evomoe.data.text.corpus import Corpus, Piece, blocks, select
from evomoe.errors import ConfigError


class HubCorpus(Corpus):
    """A data set of the Hub, or a local folder of JSON, Parquet or CSV files, with a text column.

    Rows without a text, as sets from the web have them, are left out and counted, and so are blank documents.

    Args:
        name: Name on the Hub, or path of a folder.
        config: Configuration of the data set, such as `wikitext-2-raw-v1`.
        train: Name of its training split.
        val: Name of its validation split; None holds validation text out of `train`.
        test: Name of its test split; None holds test text out of `train`.
        text_field: Column of the text.
        rows: `documents` if each row is a document of its own, `lines` if the rows are the lines of running text.
        holdout: Share of the training rows, or of blocks of about 4,096 characters of running text, that is held out
            for each missing split.

    Raises:
        ConfigError: `rows` is unknown, `datasets` is not installed, or the data set, its configuration, a split or the
            column does not exist.
    """

    remedy = "choose a split with text"

    def __init__(
        self,
        name: str,
        config: str | None = None,
        train: str = "train",
        val: str | None = "validation",
        test: str | None = "test",
        text_field: str = "text",
        rows: str = "documents",
        holdout: float = 0.05,
    ) -> None:
        if rows not in ("documents", "lines"):
            raise ConfigError(f"data.rows={rows} is unknown; use data.rows=documents or data.rows=lines")
        self._hub = HubDataset(name, config, train, val, test)
        self._text_field = text_field
        self._rows = rows
        self._holdout = HoldOut(self._hub.missing, holdout, "SPLIT")

    def identity(self) -> dict[str, Any]:
        """Return the options and the hash that `datasets` gives this revision of the data."""
        return {
            "corpus": "hub",
            "corpus_format": 2,
            **self._hub.identity(),
            "text_field": self._text_field,
            "rows": self._rows,
            "holdout": self._holdout.identity,
        }

    def pieces(self, split: str, progress: Progress) -> Iterator[Piece]:
        """Read the rows of a split; the first call downloads the data set."""
        return select(self._holdout, split, partial(self._read, progress=progress))

    def _read(self, split: str, progress: Progress) -> Iterator[Piece]:
        texts = self._texts(split, progress)
        if self._rows == "lines":
            return blocks(text if text.endswith("\n") else text + "\n" for text in texts)
        return (Piece(text, ends_document=True) for text in texts)

    def _texts(self, split: str, progress: Progress) -> Iterator[str]:
        table = self._hub.table(split)
        if self._text_field not in table.column_names:
            raise ConfigError(
                f"data.text_field={self._text_field} is no column of {self._hub.name}; choose one of "
                f"{table.column_names}"
            )
        rows = table.select_columns([self._text_field])
        self._blank[split] = 0
        for number, row in enumerate(track(progress, rows, len(rows), f"reading {split}"), start=1):
            text = row[self._text_field]
            if not isinstance(text, str | None):
                raise ConfigError(
                    f"{self._hub.describe(split)}, row {number}: {self._text_field} is {text!r}, not text; set "
                    "data.text_field"
                )
            # Between the lines of running text a blank one separates paragraphs.
            if text is None or (self._rows == "documents" and not text.strip()):
                self._blank[split] += 1
            else:
                yield text
