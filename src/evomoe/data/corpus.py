"""What corpora of every kind share: named splits, names for texts, and splits held out of the training data."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

from rich.progress import Progress

from evomoe.errors import ConfigError

Item = TypeVar("Item")

SPLITS = ("train", "val", "test")


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


def track(progress: Progress, items: Iterable[Item], total: int | None, description: str) -> Iterator[Item]:
    """Yield the items under a bar of their own, which goes when they end or are left.

    Args:
        progress: Where the bar is shown.
        items: What is counted.
        total: How many there are; None if nobody knows.
        description: Stands before the bar.
    """
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
        source: What a user can give for a split instead, in capitals; None where there is no way to give one.
    """

    def __init__(self, missing: Iterable[str], fraction: float, source: str | None = "FILE") -> None:
        self.missing = tuple(missing)
        self.fraction = fraction
        self.source = source
        if self.missing and not 0 < fraction <= 0.25:
            raise ConfigError(f"data.holdout={fraction} must be above 0 and at most 0.25; try data.holdout=0.05")
        self._saw_text = False

    @property
    def identity(self) -> float | None:
        """Return what it adds to the identity of a corpus."""
        return self.fraction if self.missing else None

    def concerns(self, split: str) -> bool:
        """Whether a split is a part of the training text."""
        return bool(self.missing) and split in ("train", *self.missing)

    def read(self, split: str, read: Callable[[str], Iterator[Item]], text_of: Callable[[Item], str]) -> Iterator[Item]:
        """Read a split, if need be out of the training items; items of equal text share a split.

        Args:
            split: The split.
            read: Reads one that is not held out.
            text_of: What decides about an item.
        """
        if self.concerns(split):
            return (item for item in read("train") if self.split_of(text_of(item)) == split)
        return read(split)

    def explain_empty(self, split: str) -> str | None:
        """Say why a split whose texts :meth:`split_of` has seen is empty; None where holding out is not to blame."""
        if not self._saw_text or not self.concerns(split):
            return None
        name = {"val": "validation", "test": "test"}[split if split in self.missing else self.missing[0]]
        given = " ".join(f"data.{missing}={self.source}" for missing in self.missing)
        instead = "" if self.source is None else f", or {given}"
        return f"the training text is too short to hold out a {name} split: give more text{instead}"

    def split_of(self, text: str) -> str:
        """Return the split that a text of the training data belongs to."""
        self._saw_text = self._saw_text or bool(text.strip())
        index = int(unit_hash(normalise(text), "holdout") / self.fraction)
        return self.missing[index] if index < len(self.missing) else "train"


class SplitCorpus(ABC):
    """Text of any kind in three splits, `train`, `val` and `test`."""

    contents: ClassVar[str]
    """What a split holds, for messages."""

    remedy: ClassVar[str]
    """What a user whose split came out empty can do."""

    left_out: ClassVar[str] = "rows"
    """What is left out where it is blank, for the notes."""

    _holdout = HoldOut((), 0.0)

    @cached_property
    def _blank(self) -> dict[str, int]:
        """How many blank ones were left out of each split."""
        return dict.fromkeys(SPLITS, 0)

    @property
    def held_out(self) -> tuple[str, ...]:
        """Return the splits that are taken out of the training text, as none is given for them."""
        return self._holdout.missing

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return plain values that determine the text: two corpora of equal identity hold the same splits."""

    def explain_empty(self, split: str) -> str:
        """Say why a split is empty, and what to do about it."""
        return self._holdout.explain_empty(split) or f"data.{split} holds no {self.contents}; {self.remedy}"

    def notes(self) -> dict[str, int]:
        """Return counts worth keeping about the reading, such as skipped files; complete once every split is read."""
        return {f"blank {self.left_out} left out of {split}": count for split, count in self._blank.items() if count}


class ItemCorpus(SplitCorpus, Generic[Item]):
    """A corpus of items of one text or several, such as pairs of sentences; one with a blank text is left out."""

    @abstractmethod
    def _read(self, split: str, progress: Progress) -> Iterator[Item]:
        """Read a split from its start, blank texts included."""

    @abstractmethod
    def texts(self, item: Item) -> Iterable[str]:
        """Return the texts of an item."""

    def items(self, split: str, progress: Progress) -> Iterator[Item]:
        """Read a split from its start, without the items of which a text is blank.

        Args:
            split: One of `SPLITS`.
            progress: Where the reading is shown.
        """
        self._blank[split] = 0
        for item in self._read(split, progress):
            if all(text.strip() for text in self.texts(item)):
                yield item
            else:
                self._blank[split] += 1
