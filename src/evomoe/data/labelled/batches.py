"""Batches of labelled sentences: one or two joined to a sequence, padded to the longest of the batch.

B sequences of a batch, S tokens of its longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from evomoe.data.labelled.store import EncodedRows
from evomoe.data.sampling import Batch


class Item(NamedTuple):
    """A sequence and its label; no tokens in a row of padding."""

    tokens: list[int]
    label: float


def join(first: Sequence[int], second: Sequence[int] | None, separator: int, context: int) -> list[int]:
    """Return one sequence of token ids of one or two sentences.

    As in RoBERTa (arXiv 1907.11692), a marker stands at the beginning, where the state is read, and after each
    sentence. The end of a text serves as both; each window of the pretraining begins with it, too.

    Args:
        first: Ids of the sentence, or of the first of two.
        second: Ids of the second; None for a single sentence.
        separator: The marker.
        context: Most ids of the sequence. What is too long loses tokens at its end, of two sentences the longer one
            first.
    """
    room = context - (2 if second is None else 3)
    if second is None:
        return [separator, *first[:room], separator]
    kept_first = min(len(first), max(room - len(second), (room + 1) // 2))
    kept_second = room - kept_first
    return [separator, *first[:kept_first], separator, *second[:kept_second], separator]


def sequence_lengths(rows: EncodedRows, pairs: bool) -> np.ndarray:
    """Return the tokens of each row with its markers, uncut, ``(N,)``."""
    return rows.lengths().sum(axis=1) + (3 if pairs else 2)


class LabelledSequences(Dataset[Item]):
    """Rows of a split as sequences; those beyond the last are padding, for ranks that would have one less than others.

    Args:
        rows: The encoded rows.
        pairs: Whether a row has two sentences.
        indices: Rows to take; None for all.
        separator: See `join`.
        context: See `join`.
    """

    def __init__(
        self, rows: EncodedRows, pairs: bool, separator: int, context: int, indices: np.ndarray | None = None
    ) -> None:
        self._rows = rows
        self._pairs = pairs
        self._separator = separator
        self._context = context
        self._indices = np.arange(len(rows)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Item:
        if index >= len(self):
            return Item([], 0)
        row = int(self._indices[index])
        first, second = self._rows[row]
        tokens = join(first, second if self._pairs else None, self._separator, self._context)
        return Item(tokens, self._rows.labels[row].item())


class Padding:
    """Makes a batch of sequences: `"tokens": (B, S) int64`, `"valid": (B, S) bool`, `"labels": (B,)`.

    Args:
        padding_id: The id that fills up.
        label_type: Type of the labels.
    """

    def __init__(self, padding_id: int, label_type: torch.dtype) -> None:
        self._padding_id = padding_id
        self._label_type = label_type

    def __call__(self, items: list[Item]) -> Batch:
        """Pad to the longest."""
        lengths = torch.tensor([len(item.tokens) for item in items])
        longest = max(int(lengths.max()), 1)
        rows: list[Any] = [item.tokens + [self._padding_id] * (longest - len(item.tokens)) for item in items]
        return {
            "tokens": torch.tensor(rows),
            "valid": torch.arange(longest) < lengths[:, None],
            "labels": torch.tensor([item.label for item in items], dtype=self._label_type),
        }
