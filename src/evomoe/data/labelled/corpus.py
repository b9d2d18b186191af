"""Labelled sentences, one or two to a row, as the tasks of GLUE (arXiv 1804.07461) have them: what a corpus is."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

from evomoe.data.corpus import ItemCorpus
from evomoe.errors import ConfigError


class Row(NamedTuple):
    """What a row of a corpus holds, and where it stands.

    Args:
        first: The sentence, or the first of two.
        second: The second; None in a corpus of single sentences.
        label: Name of its class, or a number, as it was written.
        place: File and line, for messages.
    """

    first: str
    second: str | None
    label: str
    place: str

    def sentences(self) -> str:
        """Return the text by which rows count as equal."""
        return f"{self.first}\n{self.second or ''}"


class Columns(NamedTuple):
    """Names of the columns of the sentences and of the label."""

    first: str
    second: str | None
    label: str


GLUE_COLUMNS = (
    Columns("sentence1", "sentence2", "gold_label"),  # MNLI
    Columns("sentence1", "sentence2", "label"),  # RTE, WNLI
    Columns("sentence1", "sentence2", "score"),  # STS-B
    Columns("question1", "question2", "is_duplicate"),  # QQP
    Columns("#1 String", "#2 String", "Quality"),  # MRPC
    Columns("question", "sentence", "label"),  # QNLI
    Columns("question1", "question2", "label"),  # QQP, and below MNLI, of the Hub
    Columns("premise", "hypothesis", "label"),
    Columns("sentence", None, "label"),  # SST-2, CoLA
    Columns("text", None, "label"),
)
"""How GLUE's tasks call their columns, in the order in which they are looked for."""


class ColumnChoice:
    """The columns to read: those a user names, or else the first of `GLUE_COLUMNS` that are there.

    Args:
        sentence1: Column of the sentence, or of the first of two; None looks for those of GLUE.
        sentence2: Column of the second; None for single sentences.
        label: Column of the label; None for `label`, or that of GLUE.
    """

    def __init__(self, sentence1: str | None, sentence2: str | None, label: str | None) -> None:
        if sentence1 is None and sentence2 is not None:
            raise ConfigError(f"data.sentence2={sentence2} without data.sentence1: name both columns, or neither")
        self._sentences = None if sentence1 is None else (sentence1, sentence2)
        self._label = label

    def identity(self) -> dict[str, Any]:
        """Return plain values that determine the choice."""
        return {"sentences": self._sentences and list(self._sentences), "label": self._label}

    def resolve(self, found: Collection[str], place: str) -> Columns:
        """Return the columns of a table.

        Args:
            found: Names of its columns.
            place: What it is, for the message.

        Raises:
            ConfigError: One is missing.
        """
        if self._sentences is None:
            known = [names if self._label is None else names._replace(label=self._label) for names in GLUE_COLUMNS]
            for names in known:
                if {name for name in names if name is not None} <= set(found):
                    return names
            raise ConfigError(
                f"{place} has the columns {', '.join(found)}: no sentence with a label as GLUE calls them; name yours "
                "with data.sentence1=... data.label=..., or data.header=[...] if these are no names but the first row "
                "(GLUE's own test files have no labels and cannot be used)"
            )
        names = Columns(*self._sentences, self._label or "label")
        for key, name in zip(("sentence1", "sentence2", "label"), names, strict=True):
            if name is not None and name not in found:
                raise ConfigError(f"data.{key}={name} is no column of {place}; choose among {', '.join(found)}")
        return names


class LabelledCorpus(ItemCorpus[Row]):
    """Labelled sentences in three splits, `train`, `val` and `test`."""

    contents = "labelled sentence"
    remedy = "give data with some"

    def texts(self, item: Row) -> Iterable[str]:
        """Return one sentence or two."""
        return [item.first] if item.second is None else [item.first, item.second]

    def classes(self) -> list[str] | None:
        """Return the names of the classes in an order that the data give; None if they give none. Known once read."""
        return None
