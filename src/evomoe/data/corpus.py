"""What a text corpus is: named splits that are read as a stream of pieces."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from rich.progress import Progress

from evomoe.errors import ConfigError

Item = TypeVar("Item")

SPLITS = ("train", "val", "test")

# Running text is cut at line ends into blocks of about this many characters: the unit that is encoded at once, and
# the unit that is held out when a corpus has no validation file. Part of the format of the cache.
BLOCK_CHARACTERS = 4096


class Piece(NamedTuple):
    """A part of a document, in reading order; `ends_document` says whether the next piece opens another document."""

    text: str
    ends_document: bool


class Corpus(ABC):
    """Text in three splits, `train`, `val` and `test`."""

    # What a user whose split came out empty can do; ends an error message.
    remedy = "give files with text"

    held_out: tuple[str, ...] = ()
    """Splits that are taken out of the training text, as none is given for them."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return plain values that determine the text: two corpora of equal identity hold the same splits."""

    @abstractmethod
    def pieces(self, split: str, progress: Progress) -> Iterator[Piece]:
        """Read a split from its start; the last piece of all ends a document.

        Args:
            split: One of `SPLITS`.
            progress: Where the reading is shown.
        """

    def explain_empty(self, split: str) -> str:
        """Say why a split holds no text, and what to do about it."""
        return f"data.{split} holds no text; {self.remedy}"

    def notes(self) -> dict[str, int]:
        """Return counts worth keeping about the reading, such as skipped files; complete once every split is read."""
        return {}


def fingerprint(identity: dict[str, Any]) -> str:
    """Return 16 hexadecimal digits that name `identity`."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"a.b": 1}` for `{"a": {"b": 1}}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def unit_hash(text: str, salt: str = "") -> float:
    """Return a number in [0, 1) that depends on the text and salt alone, on every machine and Python version."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=salt.encode()).digest()
    # 53 bits: the largest integer below the limit still divides to less than one.
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def normalise(text: str) -> str:
    """Return the text with every run of white space made one blank: what counts as the same text."""
    return " ".join(text.split())


def text_key(text: str) -> bytes:
    """Return 16 bytes that stand for a text, white space aside, in a set of those seen."""
    return hashlib.blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def blocks(lines: Iterable[str]) -> Iterator[Piece]:
    """Gather the lines of one document (each with its line end) into blocks of at least `BLOCK_CHARACTERS`."""
    block: list[str] = []
    size = 0
    for line in lines:
        if size >= BLOCK_CHARACTERS:
            yield Piece("".join(block), ends_document=False)
            block, size = [], 0
        block.append(line)
        size += len(line)
    if block:
        yield Piece("".join(block), ends_document=True)


def track(progress: Progress, items: Iterable[Item], total: int, description: str) -> Iterator[Item]:
    """Yield the items under a bar of their own, which goes when they end or are left."""
    task = progress.add_task(description, total=total)
    try:
        for item in items:
            yield item
            progress.advance(task)
    finally:
        progress.remove_task(task)


class HoldOut:
    """Takes the splits that a corpus lacks out of its training text.

    A piece goes where the hash of its text says, so equal pieces (white space aside) share a split: no held-out piece
    can also be a training piece.

    Args:
        missing: The splits to take out, of `val` and `test`.
        fraction: Expected share of the training pieces that each of them gets, above 0 and at most 0.25.
    """

    def __init__(self, missing: Iterable[str], fraction: float) -> None:
        self.missing = tuple(missing)
        self.fraction = fraction
        if self.missing and not 0 < fraction <= 0.25:
            raise ConfigError(f"data.holdout={fraction} must be above 0 and at most 0.25; try data.holdout=0.05")
        self._saw_text = False

    def select(self, split: str, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """Keep the pieces of one split; a gap between kept pieces ends the document."""
        return _keep(pieces, lambda text: self.split_of(text) == split) if self.missing else iter(pieces)

    def explain_empty(self, split: str, source: str) -> str | None:
        """Why a split that :meth:`select` has gone through is empty; None where holding out is not to blame.

        Args:
            split: The empty split.
            source: What a user gives for a split, in capitals.
        """
        if not self._saw_text or split not in ("train", *self.missing):
            return None
        name = {"val": "validation", "test": "test"}[split if split in self.missing else self.missing[0]]
        given = " ".join(f"data.{missing}={source}" for missing in self.missing)
        return f"the training text is too short to hold out a {name} split: give more text, or {given}"

    def split_of(self, text: str) -> str:
        """Return the split that a text of the training data belongs to."""
        self._saw_text = self._saw_text or bool(text.strip())
        index = int(unit_hash(normalise(text), "holdout") / self.fraction)
        return self.missing[index] if index < len(self.missing) else "train"


def _keep(pieces: Iterable[Piece], wanted: Callable[[str], bool]) -> Iterator[Piece]:
    waiting: str | None = None  # a kept piece whose successor is not yet known
    for text, ends_document in pieces:
        kept = wanted(text)
        if waiting is not None:
            yield Piece(waiting, ends_document=not kept)
        waiting = text if kept and not ends_document else None
        if kept and ends_document:
            yield Piece(text, ends_document=True)
