"""Corpora from the user's own files: plain text and JSON lines, either of them compressed."""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

from rich.progress import Progress

from evomoe.data.corpus import SPLITS, HoldOut, track
from evomoe.data.text.corpus import Corpus, Piece, blocks, select
from evomoe.errors import ConfigError

_JSON_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz")
_SUFFIXES = (".txt", ".txt.gz", ".gz", *_JSON_SUFFIXES)
_NO_TEXT = (".arrow.gz", ".csv.gz", ".parquet.gz", ".tar.gz", ".tsv.gz", ".warc.gz", ".xml.gz")
_PART_BYTES = 1 << 16  # of a line of running text that are read at once
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class TextFileCorpus(Corpus):
    """Text files (`.txt`: one file is one document) and JSON lines (`.jsonl`, `.json`: one row is one), also as `.gz`.

    Args:
        train: A path, a glob pattern, or a list of them.
        val: The same; None holds validation text out of `train`.
        test: The same; None holds test text out of `train`.
        text_field: Name of the text in a JSON row.
        holdout: Share of the training rows, or of blocks of about 4,096 characters of running text, that is held out
            for each missing split.

    Raises:
        ConfigError: A pattern matches no file, or a file is of another kind.
    """

    def __init__(
        self,
        train: str | Sequence[str],
        val: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        text_field: str = "text",
        holdout: float = 0.05,
    ) -> None:
        given = {"train": train, "val": val, "test": test}
        self._files = {split: _find(split, paths) for split, paths in given.items() if paths is not None}
        self._text_field = text_field
        self._holdout = HoldOut([split for split in SPLITS if split not in self._files], holdout)

    def identity(self) -> dict[str, Any]:
        """Return the digests of the files' contents: moving or renaming a file changes nothing."""
        return {"corpus": "text_files", "corpus_format": 2, **self._options, "files": self._digests}

    @property
    def _options(self) -> dict[str, Any]:
        return {
            "text_field": self._text_field,
            "holdout": self._holdout.identity,
        }

    @cached_property
    def _digests(self) -> dict[str, list[str]]:
        digests = {split: [digest(file) for file in files] for split, files in self._files.items()}
        refuse_overlap({split: zip(files, digests[split], strict=True) for split, files in self._files.items()})
        return digests

    def pieces(self, split: str, progress: Progress) -> Iterator[Piece]:
        """Read the files of a split in the order given, those of one pattern sorted by path."""
        return select(self._holdout, split, partial(self._read, progress=progress))

    def _read(self, split: str, progress: Progress) -> Iterator[Piece]:
        files = self._files[split]
        for file in track(progress, files, len(files), f"reading {split}"):
            if is_json(file):
                yield from _rows(file, self._text_field)
            else:
                yield from blocks(lines(file, _PART_BYTES))


def _find(split: str, paths: str | Sequence[str]) -> list[Path]:
    files: list[Path] = []
    for pattern in [paths] if isinstance(paths, str) else paths:
        # A name may itself hold the characters of a pattern.
        literal = Path(pattern).expanduser()
        found = [literal] if literal.is_file() else [Path(name) for name in sorted(glob.glob(str(literal)))]
        if not found:
            raise ConfigError(f"data.{split}={pattern} is no file and matches none (seen from {Path.cwd()})")
        for file in found:
            if file.is_dir():
                held = [suffix for suffix in _SUFFIXES if any(file.glob(f"*{suffix}"))] or [".txt"]
                raise ConfigError(
                    f"data.{split}: {file} is a folder; for its files write data.{split}='{file}/*{held[0]}'"
                )
            if not file.is_file() or not file.name.endswith(_SUFFIXES):
                raise ConfigError(f"data.{split}: {file} is not a file ending in {', '.join(_SUFFIXES)}")
            if file.name.endswith(_NO_TEXT):
                raise ConfigError(f"data.{split}: {file} is no plain text inside; turn it into .txt or .jsonl files")
        files += found
    if not files:
        raise ConfigError(f"data.{split} is an empty list; give at least one path, as in data.{split}=my/text.txt")
    return files


def is_json(file: Path) -> bool:
    """Whether a file holds one JSON object per line."""
    return file.name.endswith(_JSON_SUFFIXES)


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")  # type: ignore[return-value]


def digest(file: Path) -> str:
    """Return hexadecimal digits that name the content of a file and how it is read."""
    content = hashlib.blake2b(is_json(file).to_bytes(1, "big"), digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            content.update(chunk)
    return content.hexdigest()


def refuse_overlap(files: Mapping[str, Iterable[tuple[object, str]]]) -> None:
    """Refuse files of validation and test that are also trained on; the two may share some.

    Args:
        files: Name and digest of those of each split.

    Raises:
        ConfigError: One has the content of a training file.
    """
    trained = {content: file for file, content in files["train"]}
    for split in ("val", "test"):
        for file, content in files.get(split, ()):
            if content in trained:
                raise ConfigError(
                    f"data.{split}: {file} is also trained on, as {trained[content]} of data.train; leave it out of "
                    "one of them"
                )


def lines(file: Path, part_bytes: int = -1) -> Iterator[str]:
    """Yield the lines of a text file, compressed or not, each with its line end, and without a byte order mark.

    Args:
        file: The file.
        part_bytes: Most bytes in memory of a line, which then comes in several parts; -1 for whole lines.

    Raises:
        ConfigError: A line is not UTF-8, or the compressed file is damaged.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    number = 0  # lines that were read
    try:
        with _open(file) as stream:
            while part := stream.readline(part_bytes):
                yield decoder.decode(part)
                number += part.endswith(b"\n")
            decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{file}, line {number + 1}: not UTF-8 ({error.reason}); convert it, for example with"
            " iconv -f latin1 -t utf-8"
        ) from error
    except (EOFError, OSError, zlib.error) as error:
        raise ConfigError(f"{file}, after line {number}: cannot be read ({error})") from error


def parse_json(line: str, place: str) -> Any:
    """Return what a line of JSON holds.

    Raises:
        ConfigError: It is no JSON, too deep, or has a number of thousands of digits.
    """
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise ConfigError(f"{place}: not JSON ({reason}); give one JSON object per line") from error


def without_surrogates(text: str) -> str:
    """Return the text with U+FFFD for each half of a pair of surrogates, which JSON can write and UTF-8 cannot."""
    return _LONE_SURROGATE.sub("\ufffd", text)


def _rows(file: Path, text_field: str) -> Iterator[Piece]:
    for number, line in enumerate(lines(file), start=1):
        if not line.strip():
            continue
        row = parse_json(line, f"{file}, line {number}")
        if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
            fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ConfigError(
                f"{file}, line {number}: no text in field {text_field!r} (found: {fields}); set data.text_field"
            )
        if row[text_field].strip():
            yield Piece(without_surrogates(row[text_field]), ends_document=True)
