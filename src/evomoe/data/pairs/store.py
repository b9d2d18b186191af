"""Sentence pairs encoded once into memory-mapped files of token ids, by one tokenizer for both languages.

meta.json                                   also the width of an id, and the counts of each split
train.bin  val.bin  test.bin                the ids of source, target, source, ... without any marker
train.ends.npy  val.ends.npy  test.ends.npy where each of them ends, (N, 2) int64
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.progress import Progress

from evomoe.data.cache import save_array
from evomoe.data.corpus import SPLITS
from evomoe.data.encoding import TokenFile, check_length, id_dtype
from evomoe.data.pairs.corpus import PairCorpus
from evomoe.data.store import Store
from evomoe.data.tokenizer import Tokenizer
from evomoe.data.two_sided import both_sides, encode, read_ahead, side_lengths, train_tokenizer
from evomoe.errors import ConfigError


@dataclass(frozen=True)
class PairCount:
    """Pairs of a split, and the token ids of their two sides."""

    pairs: int
    source_tokens: int
    target_tokens: int

    @property
    def tokens(self) -> int:
        """Token ids of both sides."""
        return self.source_tokens + self.target_tokens


class PairFile:
    """The encoded pairs of a split, memory-mapped.

    Args:
        tokens: The ids.
        ends: Path of the positions at which the sides end.
    """

    def __init__(self, tokens: TokenFile, ends: Path) -> None:
        self._tokens = tokens
        self._ends_path = ends

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.load(self._ends_path)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of source and target of a pair."""
        return both_sides(self._tokens, self._ends, index)

    def lengths(self) -> np.ndarray:
        """Return the numbers of ids of source and target of each pair, ``(N, 2)``."""
        return side_lengths(self._ends)

    def ids(self) -> np.ndarray:
        """Return the ids of all pairs, memory-mapped, sources and targets in turn."""
        return self._tokens[:]

    def __getstate__(self) -> dict[str, Any]:
        return {"_tokens": self._tokens, "_ends_path": self._ends_path}


class PairStore(Store):
    """The encoded splits of a parallel corpus, see :class:`~evomoe.data.store.Store`."""

    format: ClassVar[dict[str, int]] = {"pair_store_format": 2}

    def _open(self, meta: dict[str, Any]) -> None:
        self.counts = {split: PairCount(**count) for split, count in meta["splits"].items()}
        self._dtype: str = meta["dtype"]
        for split, count in self.counts.items():
            check_length(self._directory / f"{split}.bin", count.tokens, self._dtype)
            if (rows := len(np.load(self._directory / f"{split}.ends.npy", mmap_mode="r"))) != count.pairs:
                raise ValueError(f"{split}.ends.npy has {rows} rows, not {count.pairs}")

    def pairs(self, split: str) -> PairFile:
        """Return the encoded pairs of a split."""
        tokens = TokenFile(self._directory / f"{split}.bin", self._dtype, self.counts[split].tokens)
        return PairFile(tokens, self._directory / f"{split}.ends.npy")

    @classmethod
    def _fill(
        cls,
        draft: Path,
        progress: Progress,
        corpus: PairCorpus,
        vocab_size: int,
        tokenizer: Tokenizer | None,
    ) -> tuple[Tokenizer, dict[str, Any]]:
        read_ahead(corpus, progress)
        if tokenizer is None:
            tokenizer = train_tokenizer(corpus, vocab_size, progress)
        dtype = id_dtype(tokenizer)
        counts = {}
        for split in SPLITS:
            with (draft / f"{split}.bin").open("wb") as file:
                ends = encode(corpus.items(split, progress), tokenizer, dtype, lambda ids: file.write(ids.tobytes()))
            if len(ends) == 0:
                raise ConfigError(corpus.explain_empty(split))
            save_array(draft / f"{split}.ends.npy", ends)
            counts[split] = asdict(PairCount(len(ends), *side_lengths(ends).sum(axis=0).tolist()))
        return tokenizer, {"dtype": dtype, "splits": counts}
