"""What the stores of all kinds of text share: a folder of the cache with a tokenizer, and what it encoded."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from rich.progress import Progress

from evomoe.data.cache import build_folder, damage_named
from evomoe.data.encoding import encoding_of
from evomoe.data.tokenizer import Tokenizer


class Store(ABC):
    """The encoded splits of a corpus, with their tokenizer.

    <cache_dir>/<fingerprint>/
        meta.json         identity, notes of the reading, and what the kind of store adds
        tokenizer.json
        ...               the ids

    Args:
        directory: A folder that `build` made.

    Raises:
        ConfigError: A file is missing or damaged.
    """

    format: ClassVar[dict[str, int]]
    """Name of the format and its version, part of the identity."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        with damage_named(directory):
            meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
            self.tokenizer = Tokenizer.from_json((directory / "tokenizer.json").read_text(encoding="utf-8"))
            self.identity: dict[str, Any] = meta["identity"]
            self.notes: dict[str, int] = meta["notes"]
            self._open(meta)

    @abstractmethod
    def _open(self, meta: dict[str, Any]) -> None:
        """Look at the files; what is wrong with them is a `ValueError`."""

    @classmethod
    @abstractmethod
    def _fill(
        cls, draft: Path, progress: Progress, corpus: Any, vocab_size: int, tokenizer: Tokenizer | None
    ) -> tuple[Tokenizer, dict[str, Any]]:
        """Write the ids into an empty folder; returns the tokenizer, and what `meta.json` holds of them."""

    @classmethod
    def identity_of(
        cls, corpus: Any, vocab_size: int, tokenizer: Tokenizer | None = None, **options: Any
    ) -> dict[str, Any]:
        """Return the plain values from which the content of a store follows; their fingerprint names its folder."""
        return {**cls.format, **options, **encoding_of(vocab_size, tokenizer), **corpus.identity()}

    @classmethod
    def build(
        cls, corpus: Any, vocab_size: int, cache_dir: Path, tokenizer: Tokenizer | None = None, **options: Any
    ) -> Path:
        """Encode a corpus, with a tokenizer trained on it unless one is given, unless the cache holds it already.

        Args:
            corpus: What is encoded.
            vocab_size: Largest number of tokens of a tokenizer that is trained on it.
            cache_dir: Folder of all caches.
            tokenizer: One that is given; None trains one.
            options: Those of the kind of store.

        Returns:
            The folder of the store.

        Raises:
            ConfigError: The vocabulary is too small, a split is empty, or `cache_dir` cannot be written.
        """
        identity = cls.identity_of(corpus, vocab_size, tokenizer, **options)

        def write(draft: Path, progress: Progress) -> None:
            used, meta = cls._fill(draft, progress, corpus, vocab_size, tokenizer, **options)
            (draft / "tokenizer.json").write_text(used.to_json(), encoding="utf-8")
            meta = {"identity": identity, **meta, "notes": corpus.notes()}
            (draft / "meta.json").write_text(json.dumps(meta, indent=2), encoding="utf-8")

        return build_folder(cache_dir, identity, write)
