"""What a text corpus is: named splits that are read as a stream of pieces."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from rich.progress import Progress

from evomoe.data.corpus import HoldOut

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


def select(holdout: HoldOut, split: str, pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Keep the pieces of one split; a gap between kept pieces ends the document."""
    if not holdout.missing:
        yield from pieces
        return
    waiting: str | None = None  # a kept piece whose successor is not yet known
    for text, ends_document in pieces:
        kept = holdout.split_of(text) == split
        if waiting is not None:
            yield Piece(waiting, ends_document=not kept)
        waiting = text if kept and not ends_document else None
        if kept and ends_document:
            yield Piece(text, ends_document=True)
