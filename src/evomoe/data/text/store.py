"""Splits encoded once into memory-mapped files of token ids.

    <cache_dir>/<fingerprint>/
        meta.json         identity, width of an id, and the counts of each split
        tokenizer.json
        train.bin  val.bin  test.bin

A split is the end-of-text token followed by its documents, each closed by the end-of-text token, so that the first
token of the first document has something to be predicted from.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, TaskID

from evomoe.data.cache import build_folder
from evomoe.data.corpus import SPLITS, fingerprint
from evomoe.data.encoding import TokenFile, encoding_of, id_dtype
from evomoe.data.text.corpus import Corpus, Piece
from evomoe.data.tokenizer import Tokenizer
from evomoe.errors import ConfigError

_FORMAT = 1
_SAMPLE_CHARACTERS = 50_000_000  # of training text that the tokenizer learns from
_BATCH_CHARACTERS = 1_000_000  # of text that is encoded at once


@dataclass(frozen=True)
class SplitSize:
    """Token ids in the file of a split; documents, white-space-separated words and UTF-8 bytes of its text."""

    tokens: int
    documents: int
    words: int
    bytes: int


class TokenStore:
    """The encoded splits of a corpus, with their tokenizer.

    Args:
        directory: A folder that `TokenStore.build` made.

    Raises:
        ConfigError: A file is missing or of the wrong length.
    """

    def __init__(self, directory: Path) -> None:
        try:
            meta = json.loads((directory / "meta.json").read_text())
            self.tokenizer = Tokenizer.from_json((directory / "tokenizer.json").read_text())
            self.identity: dict[str, Any] = meta["identity"]
            self.notes: dict[str, int] = meta["notes"]
            self.sizes = {split: SplitSize(**size) for split, size in meta["splits"].items()}
            for split, size in self.sizes.items():
                expected = size.tokens * np.dtype(meta["dtype"]).itemsize
                if (found := (directory / f"{split}.bin").stat().st_size) != expected:
                    raise ValueError(f"{split}.bin has {found} bytes, not {expected}")
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"the data cache {directory} is damaged ({error}); delete the folder to rebuild"
            ) from error
        self.fingerprint = fingerprint(self.identity)
        self._directory = directory
        self._dtype: str = meta["dtype"]

    def tokens(self, split: str) -> TokenFile:
        """Return the ids of a split."""
        return TokenFile(self._directory / f"{split}.bin", self._dtype, self.sizes[split].tokens)

    @staticmethod
    def identity_of(corpus: Corpus, vocab_size: int, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
        """Return the plain values from which the content of a store follows; their fingerprint names its folder."""
        return {"store_format": _FORMAT, **encoding_of(vocab_size, tokenizer), **corpus.identity()}

    @staticmethod
    def build(corpus: Corpus, vocab_size: int, cache_dir: Path, tokenizer: Tokenizer | None = None) -> Path:
        """Encode the corpus, with a tokenizer trained on it unless one is given, unless the cache holds it already.

        Args:
            corpus: The text.
            vocab_size: Largest number of tokens of a tokenizer that is trained on it.
            cache_dir: Folder of all caches.
            tokenizer: One that is given; None trains one.

        Returns:
            The folder of the store.

        Raises:
            ConfigError: The vocabulary is too small, a split holds no text, or `cache_dir` cannot be written.
        """
        identity = TokenStore.identity_of(corpus, vocab_size, tokenizer)

        def write(draft: Path, progress: Progress) -> None:
            _write(draft, progress, corpus, vocab_size, tokenizer, identity)

        return build_folder(cache_dir, identity, write)


def _write(
    draft: Path,
    progress: Progress,
    corpus: Corpus,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    identity: dict[str, Any],
) -> None:
    sample = _Sample(_SAMPLE_CHARACTERS)
    characters = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        blank = True
        for piece in corpus.pieces(split, progress):
            blank = blank and not piece.text.strip()
            characters[split] += len(piece.text)
            if split == "train" and tokenizer is None:
                sample.add(piece.text)
        if blank:
            raise ConfigError(corpus.explain_empty(split))

    if tokenizer is None:
        task = progress.add_task("training the tokenizer", total=None)
        tokenizer = Tokenizer.train(sample.texts, vocab_size)
        progress.remove_task(task)
    (draft / "tokenizer.json").write_text(tokenizer.to_json())

    dtype = id_dtype(tokenizer)
    sizes = {}
    task = progress.add_task("encoding", total=sum(characters.values()))
    for split in SPLITS:
        pieces = _advance(corpus.pieces(split, progress), progress, task)
        sizes[split] = _encode(pieces, tokenizer, draft / f"{split}.bin", dtype)

    meta = {
        "identity": identity,
        "dtype": dtype,
        "splits": {split: asdict(size) for split, size in sizes.items()},
        "notes": corpus.notes(),
    }
    (draft / "meta.json").write_text(json.dumps(meta, indent=2))


class _Sample:
    """An even sample of a stream of texts: every first, then every second, fourth, ... as the limit is met."""

    def __init__(self, limit: int) -> None:
        self.texts: list[str] = []
        self._limit = limit
        self._characters = 0
        self._stride = 1
        self._position = 0

    def add(self, text: str) -> None:
        if self._position % self._stride == 0:
            self.texts.append(text)
            self._characters += len(text)
        self._position += 1
        while self._characters > self._limit and len(self.texts) > 1:
            self.texts = self.texts[::2]
            self._characters = sum(map(len, self.texts))
            self._stride *= 2


def _advance(pieces: Iterable[Piece], progress: Progress, task: TaskID) -> Iterator[Piece]:
    for piece in pieces:
        yield piece
        progress.advance(task, len(piece.text))


def _encode(pieces: Iterable[Piece], tokenizer: Tokenizer, path: Path, dtype: str) -> SplitSize:
    tokens = documents = words = size = 0
    with path.open("wb") as file:

        def write(ids: list[int]) -> None:
            nonlocal tokens
            tokens += len(ids)
            np.asarray(ids, dtype=dtype).tofile(file)

        write([tokenizer.end_of_text_id])
        for batch in _batches(pieces):
            for piece, ids in zip(batch, tokenizer.encode_batch([piece.text for piece in batch]), strict=True):
                write([*ids, tokenizer.end_of_text_id] if piece.ends_document else ids)
                documents += piece.ends_document
                words += len(piece.text.split())
                size += len(piece.text.encode())
    return SplitSize(tokens=tokens, documents=documents, words=words, bytes=size)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    characters = 0
    for piece in pieces:
        batch.append(piece)
        characters += len(piece.text)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch
