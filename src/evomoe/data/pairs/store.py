"""Sentence pairs encoded once into memory-mapped files of token ids, by one tokenizer for both languages.

<cache_dir>/<fingerprint>/
    meta.json         identity, width of an id, and the counts of each split
    tokenizer.json
    train.bin  val.bin  test.bin                the ids of source, target, source, ... without any marker
    train.ends.npy  val.ends.npy  test.ends.npy where each of them ends, (N, 2) int64
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from evomoe.data.cache import build_folder
from evomoe.data.corpus import SPLITS
from evomoe.data.encoding import TokenFile, encoding_of, id_dtype
from evomoe.data.pairs.corpus import Pair, PairCorpus
from evomoe.data.tokenizer import Tokenizer
from evomoe.errors import ConfigError

_FORMAT = 1
_SAMPLED_PAIRS = 1_000_000  # of the training split that the tokenizer learns from
_PAIRS_AT_ONCE = 10_000  # that are encoded at once


@dataclass(frozen=True)
class PairCount:
    """Pairs of a split, and the token ids of their two sides."""

    pairs: int
    source_tokens: int
    target_tokens: int


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
        start = self._ends[index - 1, 1] if index else 0
        middle, end = self._ends[index]
        return self._tokens[start:middle], self._tokens[middle:end]

    def lengths(self) -> np.ndarray:
        """Return the numbers of ids of source and target of each pair, ``(N, 2)``."""
        return np.diff(self._ends.reshape(-1), prepend=0).reshape(-1, 2)

    def ids(self) -> np.ndarray:
        """Return the ids of all pairs, memory-mapped, sources and targets in turn."""
        return self._tokens[:]

    def __getstate__(self) -> dict[str, Any]:
        return {"_tokens": self._tokens, "_ends_path": self._ends_path}


class PairStore:
    """The encoded splits of a parallel corpus, with their tokenizer.

    Args:
        directory: A folder that `PairStore.build` made.

    Raises:
        ConfigError: A file is missing or of the wrong length.
    """

    def __init__(self, directory: Path) -> None:
        try:
            meta = json.loads((directory / "meta.json").read_text())
            self.tokenizer = Tokenizer.from_json((directory / "tokenizer.json").read_text())
            self.identity: dict[str, Any] = meta["identity"]
            self.notes: dict[str, int] = meta["notes"]
            self.counts = {split: PairCount(**count) for split, count in meta["splits"].items()}
            for split, count in self.counts.items():
                expected = (count.source_tokens + count.target_tokens) * np.dtype(meta["dtype"]).itemsize
                if (found := (directory / f"{split}.bin").stat().st_size) != expected:
                    raise ValueError(f"{split}.bin has {found} bytes, not {expected}")
                if (rows := len(np.load(directory / f"{split}.ends.npy", mmap_mode="r"))) != count.pairs:
                    raise ValueError(f"{split}.ends.npy has {rows} rows, not {count.pairs}")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the data cache {directory} is damaged ({error}); delete the folder to rebuild"
            ) from error
        self._directory = directory
        self._dtype: str = meta["dtype"]

    def pairs(self, split: str) -> PairFile:
        """Return the encoded pairs of a split."""
        count = self.counts[split]
        length = count.source_tokens + count.target_tokens
        tokens = TokenFile(self._directory / f"{split}.bin", self._dtype, length)
        return PairFile(tokens, self._directory / f"{split}.ends.npy")

    @staticmethod
    def identity_of(corpus: PairCorpus, vocab_size: int, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
        """Return the plain values from which the content of a store follows; their fingerprint names its folder."""
        return {"pair_store_format": _FORMAT, **encoding_of(vocab_size, tokenizer), **corpus.identity()}

    @staticmethod
    def build(corpus: PairCorpus, vocab_size: int, cache_dir: Path, tokenizer: Tokenizer | None = None) -> Path:
        """Encode the pairs, with a tokenizer trained on them unless one is given, unless the cache holds them already.

        Args:
            corpus: The pairs.
            vocab_size: Largest number of tokens of a tokenizer that is trained on them.
            cache_dir: Folder of all caches.
            tokenizer: One that is given; None trains one.

        Returns:
            The folder of the store.

        Raises:
            ConfigError: The vocabulary is too small, a split holds no pair, or `cache_dir` cannot be written.
        """
        identity = PairStore.identity_of(corpus, vocab_size, tokenizer)

        def write(draft: Path, progress: Progress) -> None:
            _write(draft, progress, corpus, tokenizer or _train(corpus, vocab_size, progress), identity)

        return build_folder(cache_dir, identity, write)


def _train(corpus: PairCorpus, vocab_size: int, progress: Progress) -> Tokenizer:
    sample = islice(corpus.pairs("train", progress), _SAMPLED_PAIRS)
    return Tokenizer.train((text for pair in sample for text in pair), vocab_size)


def _write(draft: Path, progress: Progress, corpus: PairCorpus, tokenizer: Tokenizer, identity: dict[str, Any]) -> None:
    (draft / "tokenizer.json").write_text(tokenizer.to_json())
    dtype = id_dtype(tokenizer)
    counts = {}
    for split in SPLITS:
        count = _encode(corpus.pairs(split, progress), tokenizer, draft, split, dtype)
        if count.pairs == 0:
            raise ConfigError(corpus.explain_empty(split))
        counts[split] = asdict(count)
    meta = {"identity": identity, "dtype": dtype, "splits": counts, "notes": corpus.notes()}
    (draft / "meta.json").write_text(json.dumps(meta, indent=2))


def _encode(pairs: Iterator[Pair], tokenizer: Tokenizer, draft: Path, split: str, dtype: str) -> PairCount:
    lengths: list[int] = []  # of source, target, source, ...
    with (draft / f"{split}.bin").open("wb") as file:
        while chunk := list(islice(pairs, _PAIRS_AT_ONCE)):
            encoded = tokenizer.encode_batch([text for pair in chunk for text in pair])
            lengths += map(len, encoded)
            np.asarray([token for ids in encoded for token in ids], dtype=dtype).tofile(file)
    np.save(draft / f"{split}.ends.npy", np.cumsum(lengths, dtype=np.int64).reshape(-1, 2))
    return PairCount(pairs=len(lengths) // 2, source_tokens=sum(lengths[::2]), target_tokens=sum(lengths[1::2]))
