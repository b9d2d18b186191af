"""Labelled sentences from tables: tab-separated files as GLUE's, JSON lines, and data sets of the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from evomoe.data.corpus import SPLITS, HoldOut, track
from evomoe.data.hub import HubDataset
from evomoe.data.labelled.corpus import ColumnChoice, LabelledCorpus, Row
from evomoe.data.text.files import digest, is_json, lines, parse_json, refuse_overlap, without_surrogates
from evomoe.errors import ConfigError

BAD_LINES = ("refuse", "drop")
_SUFFIXES = (".tsv", ".tsv.gz", ".jsonl", ".jsonl.gz")


class LabelledFiles(LabelledCorpus):
    """Files of rows: `.tsv` (a header, then fields between tabs, nothing quoted), `.jsonl`, either with `.gz`.

    Args:
        train: Path of the training rows.
        val: The same for validation; None holds it out of `train`.
        test: The same for the test; None holds it out of `train`.
        columns: Which of them to read.
        header: Names of the columns of `.tsv` files that begin without a header.
        holdout: Share of the training rows that is held out for each missing split.
        bad_lines: Whether a line of too many or too few fields, or that is no JSON object, is an error (`refuse`) or is
            left out and counted (`drop`).

    Raises:
        ConfigError: A file does not exist, or is of another kind, or `bad_lines` is unknown.
    """

    def __init__(
        self,
        train: str,
        val: str | None,
        test: str | None,
        columns: ColumnChoice,
        header: Sequence[str] | None = None,
        holdout: float = 0.05,
        bad_lines: str = "refuse",
    ) -> None:
        if bad_lines not in BAD_LINES:
            raise ConfigError(
                f"data.bad_lines={bad_lines} is unknown; use data.bad_lines=refuse or data.bad_lines=drop"
            )
        given = {"train": train, "val": val, "test": test}
        self._files = {split: _find(split, path) for split, path in given.items() if path is not None}
        self._columns = columns
        self._header = None if header is None else list(header)
        self._drops_bad_lines = bad_lines == "drop"
        self._bad_lines: dict[str, int] = {}
        self._holdout = HoldOut([split for split in SPLITS if split not in self._files], holdout)

    def identity(self) -> dict[str, Any]:
        """Return the options and the digests of the files' contents: moving or renaming a file changes nothing."""
        return {
            "corpus": "labelled_files",
            "corpus_format": 2,
            "columns": self._columns.identity(),
            "header": self._header,
            "holdout": self._holdout.identity,
            "files": self._digests,
            # Only if so: what was read without the option is what it would read.
            **({"bad_lines": "drop"} if self._drops_bad_lines else {}),
        }

    @cached_property
    def _digests(self) -> dict[str, str]:
        digests = {split: digest(file) for split, file in self._files.items()}
        refuse_overlap({split: [(self._files[split], content)] for split, content in digests.items()})
        return digests

    def notes(self) -> dict[str, int]:
        """Return how many rows and lines were left out, by split and by file; complete once all are read."""
        bad = {f"malformed lines left out of {split}": count for split, count in self._bad_lines.items() if count}
        return super().notes() | bad

    def _read(self, split: str, progress: Progress) -> Iterator[Row]:
        return self._holdout.read(split, partial(self._rows, progress=progress), Row.sentences)

    def _rows(self, split: str, progress: Progress) -> Iterator[Row]:
        file = self._files[split]
        self._bad_lines[split] = 0
        each_has_names = is_json(file)
        records = self._json(split) if each_has_names else self._fields(split)
        names = None
        for number, record in track(progress, records, None, f"reading {split}"):
            place = f"{file}, line {number}"
            if names is None or each_has_names:
                names = self._columns.resolve(record, f"data.{split}: {place if each_has_names else file}")
            second = None if names.second is None else _text(record, names.second, place)
            row = Row(_text(record, names.first, place), second, _text(record, names.label, place), place)
            if row.label.strip():
                yield row
            else:
                self._reject(split, f"{place}: {names.label} is empty; give every row its label")

    def _fields(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number of each line of a table and its fields by column."""
        file = self._files[split]
        header = self._header
        for number, line in enumerate(lines(file), start=1):
            fields = line.rstrip("\r\n").split("\t")
            if fields == [""]:
                continue
            if header is None:
                header = fields
            elif len(fields) != len(header):
                self._reject(
                    split,
                    f"{file}, line {number} has {len(fields)} fields, and there are {len(header)} columns "
                    f"({', '.join(header)}): every line needs one field for each, with tabs between them",
                )
            else:
                yield number, dict(zip(header, fields, strict=True))

    def _json(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        file = self._files[split]
        for number, line in enumerate(lines(file), start=1):
            if not line.strip():
                continue
            try:
                record = parse_json(line, f"{file}, line {number}")
            except ConfigError as error:
                self._reject(split, str(error))
                continue
            if isinstance(record, dict):
                yield number, record
            else:
                kind = type(record).__name__
                self._reject(split, f"{file}, line {number}: a {kind}; give one JSON object per line")

    def _reject(self, split: str, message: str) -> None:
        if not self._drops_bad_lines:
            raise ConfigError(f"{message}, or leave such lines out with data.bad_lines=drop")
        self._bad_lines[split] += 1


class HubLabels(LabelledCorpus):
    """A data set of the Hub, or a local folder of JSON, Parquet or CSV files, with columns of sentences and labels.

    Args:
        name: Name on the Hub, or path of a folder.
        config: Configuration of the data set, such as `sst2`.
        train: Name of its training split.
        val: Name of its validation split; None holds it out of `train`.
        test: Name of its test split; None holds it out of `train`.
        columns: Which of them to read.
        holdout: Share of the training rows that is held out for each missing split.

    Raises:
        ConfigError: `datasets` is not installed, or the data set, a split or a column does not exist.
    """

    def __init__(
        self,
        name: str,
        config: str | None,
        train: str,
        val: str | None,
        test: str | None,
        columns: ColumnChoice,
        holdout: float = 0.05,
    ) -> None:
        self._hub = HubDataset(name, config, train, val, test)
        self._columns = columns
        self._classes: list[str] | None = None
        self._holdout = HoldOut(self._hub.missing, holdout, "SPLIT")

    def identity(self) -> dict[str, Any]:
        """Return the options and the hash that `datasets` gives this revision of the data."""
        return {
            "corpus": "hub_labels",
            "corpus_format": 2,
            **self._hub.identity(),
            "columns": self._columns.identity(),
            "holdout": self._holdout.identity,
        }

    def classes(self) -> list[str] | None:
        """Return the names of the classes in the order of their numbers on the Hub, where labels are such numbers."""
        return self._classes

    def _read(self, split: str, progress: Progress) -> Iterator[Row]:
        return self._holdout.read(split, partial(self._rows, progress=progress), Row.sentences)

    def _rows(self, split: str, progress: Progress) -> Iterator[Row]:
        name, table = self._hub.describe(split), self._hub.table(split)
        columns = self._columns.resolve(table.column_names, name)
        classes = self._classes = getattr(table.features[columns.label], "names", None)
        table = table.select_columns([column for column in columns if column is not None])
        for number, record in enumerate(track(progress, table, len(table), f"reading {split}"), start=1):
            place = f"{name}, row {number}"
            label = _text(record, columns.label, place)
            if not label.strip():
                raise ConfigError(f"{place}: {columns.label} is empty; choose a split whose rows all have a label")
            if classes is not None:
                if not 0 <= int(label) < len(classes):  # the Hub marks the rows of an unlabelled test with -1
                    raise ConfigError(
                        f"{place} has the label {label}, which is none of its classes: choose a labelled split"
                    )
                label = classes[int(label)]
            second = None if columns.second is None else _text(record, columns.second, place)
            yield Row(_text(record, columns.first, place), second, label, place)


def _text(record: Mapping[str, Any], column: str, place: str) -> str:
    """Return a field as text, empty where it is null; JSON may write a label as a number."""
    value = record[column]
    if value is None:
        return ""
    if not isinstance(value, str | int | float):
        raise ConfigError(f"{place}: {column} is {value!r}, neither text nor a number")
    return without_surrogates(str(value))


def _find(split: str, given: str) -> Path:
    path = Path(given).expanduser()
    if not path.is_file():
        raise ConfigError(f"data.{split}={given} is no file (seen from {Path.cwd()})")
    if not path.name.endswith(_SUFFIXES):
        raise ConfigError(f"data.{split}={given} is of another kind: expected a name ending in {', '.join(_SUFFIXES)}")
    return path
