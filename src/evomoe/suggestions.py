"""Spelling: the nearest word to one that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any


def nearest_word(word: str, known: Sequence[str]) -> str:
    """``; did you mean 'x'?`` with the known words that come close, or all of them where they are few."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; expected one of {', '.join(known)}" if known and len(known) <= 30 else ""


def unknown_key(key: str, values: Any) -> str:
    """That a key is not among those of nested ``values``, and the nearest one that is."""
    return f"there is no key {key!r}{nearest_key(key, _flatten(values))}"


def nearest_key(key: str, known: Sequence[str]) -> str:
    """The same for a dotted key: first among its siblings, then a key of that name anywhere else."""
    parent, _, name = key.rpartition(".")
    by_name = {other.rpartition(".")[2]: other for other in reversed(known)}
    siblings = {other.rpartition(".")[2]: other for other in known if other.rpartition(".")[0] == parent}
    for names, cutoff in ((siblings, 0.6), (by_name, 0.8)):
        close = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
        if close:
            return f"; did you mean {names[close[0]]!r}?"
    return nearest_word(name, sorted(siblings))


def _flatten(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    keys = []
    for name, value in node.items():
        if name != "_target_":
            keys += [f"{prefix}{name}", *_flatten(value, f"{prefix}{name}.")]
    return keys
