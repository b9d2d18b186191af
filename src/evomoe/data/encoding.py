"""Token ids on disk, and how they come about."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from evomoe.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from evomoe.errors import ConfigError


class TokenFile:
    """A memory-mapped sequence of token ids that travels to another process as its path.

    Args:
        path: Raw little-endian ids without header.
        dtype: Name of the integer type.
        length: Number of ids.
    """

    def __init__(self, path: Path, dtype: str, length: int) -> None:
        self._path = path
        self._dtype = dtype
        self._length = length
        self._ids: np.memmap | None = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice) -> np.ndarray:
        if self._ids is None:
            self._ids = np.memmap(self._path, dtype=self._dtype, mode="r", shape=(self._length,))
        return self._ids[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ids": None}


def check_length(path: Path, length: int, dtype: str) -> None:
    """Refuse a file of token ids that holds more or fewer than it should.

    Raises:
        ValueError: It does.
    """
    expected = length * np.dtype(dtype).itemsize
    if (found := path.stat().st_size) != expected:
        raise ValueError(f"{path.name} has {found} bytes, not {expected}")


def id_dtype(tokenizer: Tokenizer) -> str:
    """Return the narrowest little-endian integer type that holds every token id."""
    return "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"


def encoding_of(vocab_size: int, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return the plain values that say how a store encodes: with a given tokenizer, or one of its own of a size.

    Raises:
        ConfigError: The vocabulary of its own has no room for every byte.
    """
    if tokenizer is not None:
        return {"tokenizer": hashlib.sha256(tokenizer.to_json().encode()).hexdigest()[:16]}
    if vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"data.vocab_size={vocab_size} is too small: byte-level BPE needs at least {SMALLEST_VOCABULARY}"
        )
    return {"vocab_size": vocab_size}
