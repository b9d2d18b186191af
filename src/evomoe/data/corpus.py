"""What corpora of every kind share: named splits, names for texts, and splits held out of the training data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

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

    def explain_empty(self, split: str, source: str) -> str | None:
        """Why a split that whose texts :meth:`split_of` has seen is empty; None where holding out is not to blame.

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
