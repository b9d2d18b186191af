"""Splits encoded once into memory-mapped files of token ids.

    meta.json                     also the width of an id, and the counts of each split
    train.bin  val.bin  test.bin

A split is the end-of-text token followed by its documents, each closed by the end-of-text token, so that the first
token of the first document has something to be predicted from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from rich.progress import Progress, TaskID

from evomoe.data.corpus import SPLITS
from evomoe.data.encoding import TokenFile, check_length, id_dtype
from evomoe.data.store import Store
from evomoe.data.text.corpus import Corpus, Piece
from evomoe.data.tokenizer import Sample, Tokenizer
from evomoe.errors import ConfigError

_BATCH_CHARACTERS = 1_000_000  # of text that is encoded at once


@dataclass(frozen=True)
class SplitSize:
    """Token ids in the file of a split; documents, white-space-separated words and UTF-8 bytes of its text."""

    tokens: int
    documents: int
    words: int
    bytes: int


class TokenStore(Store):
    """The encoded splits of a text corpus, see :class:`~evomoe.data.store.Store`."""

    format: ClassVar[dict[str, int]] = {"store_format": 1}

    def _open(self, meta: dict[str, Any]) -> None:
        self.sizes = {split: SplitSize(**size) for split, size in meta["splits"].items()}
        self._dtype: str = meta["dtype"]
        for split, size in self.sizes.items():
            check_length(self._directory / f"{split}.bin", size.tokens, self._dtype)

    def tokens(self, split: str) -> TokenFile:
        """Return the ids of a split."""
        return TokenFile(self._directory / f"{split}.bin", self._dtype, self.sizes[split].tokens)

    @classmethod
    def _fill(
        cls,
        draft: Path,
        progress: Progress,
        corpus: Corpus,
        vocab_size: int,
        tokenizer: Tokenizer | None,
    ) -> tuple[Tokenizer, dict[str, Any]]:
        # All splits are read once before the long work, which an empty one would spoil at its end.
        sample = Sample()
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

        dtype = id_dtype(tokenizer)
        sizes = {}
        task = progress.add_task("encoding", total=sum(characters.values()))
        for split in SPLITS:
            pieces = _advance(corpus.pieces(split, progress), progress, task)
            sizes[split] = asdict(_encode(pieces, tokenizer, draft / f"{split}.bin", dtype))
        return tokenizer, {"dtype": dtype, "splits": sizes}


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
            file.write(np.asarray(ids, dtype=dtype).tobytes())  # tofile would hide that the disk is full

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
