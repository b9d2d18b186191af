"""What a text corpus is: named splits that are read as a stream of pieces."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from rich.progress import Progress

from evomoe.data.corpus import HoldOut, SplitCorpus

# Running text is cut at line ends into blocks of about this many characters: the unit that is encoded at once, and
# the unit that is held out when a corpus has no validation file. Part of the format of the cache.
BLOCK_CHARACTERS = 4096

# A line of more characters, as of a text without line ends, is cut into blocks as well. Part of the format too.
LONGEST_LINE = 65_536


class Piece(NamedTuple):
    """A part of a document, in reading order; `ends_document` says whether the next piece opens another document."""

    text: str
    ends_document: bool


class Corpus(SplitCorpus):
    """Text in three splits, `train`, `val` and `test`."""

    contents = "text"
    remedy = "give files with text"

    @abstractmethod
    def pieces(self, split: str, progress: Progress) -> Iterator[Piece]:
        """Read a split from its start; the last piece of all ends a document.

        Args:
            split: One of `SPLITS`.
            progress: Where the reading is shown.
        """


def blocks(lines: Iterable[str]) -> Iterator[Piece]:
    """Gather the lines of one document into blocks of at least `BLOCK_CHARACTERS`.

    Args:
        lines: Each with its line end; a long one may come in several parts.
    """
    block: list[str] = []
    size = 0
    for line in _cut(lines):
        if size >= BLOCK_CHARACTERS:
            yield Piece("".join(block), ends_document=False)
            block, size = [], 0
        block.append(line)
        size += len(line)
    if block:
        yield Piece("".join(block), ends_document=True)


def _cut(lines: Iterable[str]) -> Iterator[str]:
    """Cut what exceeds `LONGEST_LINE` before the first blank that completes a block, or else where the block is full.

    A blank stays with the word behind it, which byte-level BPE then encodes as in the whole line.
    """
    rest = ""
    for part in lines:
        rest += part
        start = 0
        while len(rest) - start > LONGEST_LINE:
            full = start + BLOCK_CHARACTERS
            end = max(rest.find(" ", full, start + LONGEST_LINE), full)
            yield rest[start:end]
            start = end
        rest = rest[start:]
        if rest.endswith("\n"):
            yield rest
            rest = ""
    if rest:
        yield rest


def select(holdout: HoldOut, split: str, read: Callable[[str], Iterator[Piece]]) -> Iterator[Piece]:
    """Read a split, as `HoldOut.read` does, where a gap between kept pieces ends the document."""
    if not holdout.concerns(split):
        yield from read(split)
        return
    waiting: str | None = None  # a kept piece whose successor is not yet known
    for text, ends_document in read("train"):
        kept = holdout.split_of(text) == split
        if waiting is not None:
            yield Piece(waiting, ends_document=not kept)
        waiting = text if kept and not ends_document else None
        if kept and ends_document:
            yield Piece(text, ends_document=True)
