"""Lightning datamodules for language modelling on text: one base class, one subclass per source of text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from evomoe.data.datamodule import StoredDataModule
from evomoe.data.sampling import Batch, ResumableDataLoader, rank_and_world_size
from evomoe.data.text.corpus import Corpus
from evomoe.data.text.embedded import EmbeddedCorpus
from evomoe.data.text.files import TextFileCorpus
from evomoe.data.text.hub import HubCorpus
from evomoe.data.text.store import TokenStore
from evomoe.data.text.windows import evaluation_windows, training_windows


class TextDataModule(StoredDataModule[TokenStore]):
    """Batches of token windows from a corpus, for causal language modelling.

    Training batches are `{"tokens": (B, S + 1) int64}`; evaluation batches also hold `"valid": (B, S) bool`, False
    where the pair (input s, target s + 1) is padding. In a run of several processes, the last evaluation batch of a
    rank may be padding throughout.

    Args:
        corpus: The text.
        context: S, tokens that a model sees at once.
        batch_size: B, windows per training batch and process.
        cache_dir: Folder of the encoded corpora.
        eval_batch_size: Windows per evaluation batch and process; None for `batch_size`.
        vocab_size: Largest number of tokens of the tokenizer, where none is adopted.
        num_workers: Processes that read batches ahead; 0 reads in the training process.
        seed: Seed of the training order.
        mask_token: Give the model one more token, after those of the tokenizer, to stand for a hidden word.

    Raises:
        ConfigError: A size is not positive.
    """

    store_class = TokenStore
    holds = "text"

    def __init__(
        self,
        corpus: Corpus,
        *,
        context: int,
        batch_size: int,
        cache_dir: str | Path,
        eval_batch_size: int | None = None,
        vocab_size: int = 4096,
        num_workers: int = 0,
        seed: int = 0,
        mask_token: bool = False,
    ) -> None:
        sizes = {"context": context, "batch_size": batch_size, "eval_batch_size": eval_batch_size}
        super().__init__(corpus, cache_dir, vocab_size, sizes, num_workers, seed)
        self.context = context
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.mask_token = mask_token

    def model_sizes(self) -> dict[str, int]:
        """Return the arguments of a model that the data decide."""
        return {"vocab_size": self.vocab_size + self.mask_token}

    def training_ids(self) -> np.ndarray:
        """The token ids of the training split, memory-mapped, ``(N,)``."""
        return self.store.tokens("train")[:]

    def units(self, split: str) -> dict[str, int]:
        """Return the counts that turn the mean loss of a split into perplexity per word or byte.

        Args:
            split: `train`, `val` or `test`.

        Returns:
            `tokens`, the targets of one pass: every id but the first, `<|endoftext|>` included; `words`, separated by
            white space; `bytes` of UTF-8. Perplexity per word is `exp(mean loss * tokens / words)`.
        """
        size = self.store.sizes[split]
        return {"tokens": size.tokens - 1, "words": size.words, "bytes": size.bytes}

    def describe(self) -> str:
        """Return one line for the log: what the text is, and how much of it."""
        sizes = ", ".join(
            f"{split} {size.bytes / 1e6:.2f} MB in {size.documents:,} documents = {size.tokens / 1e6:.2f} M tokens"
            for split, size in self.store.sizes.items()
        )
        notes = "".join(f", {count:,} {name.replace('_', ' ')}" for name, count in self.store.notes.items())
        return f"{self.store.identity['corpus']}: {sizes}; vocabulary {self.vocab_size:,}{notes} ({self.fingerprint})"

    def train_dataloader(self) -> ResumableDataLoader:
        """Return the shuffled training batches, whose position Lightning saves and restores."""
        rank, world_size = rank_and_world_size()
        return training_windows(
            self.store.tokens("train"),
            fingerprint=self.fingerprint,
            context=self.context,
            batch_size=self.batch_size,
            seed=self.seed,
            num_workers=self.num_workers,
            rank=rank,
            world_size=world_size,
        )

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation windows, in an order drawn once for all."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test windows, in an order drawn once for all."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Batch]:
        rank, world_size = rank_and_world_size()
        return evaluation_windows(
            self.store.tokens(split),
            context=self.context,
            padding_id=self.tokenizer.end_of_text_id,
            batch_size=self.eval_batch_size,
            num_workers=self.num_workers,
            rank=rank,
            world_size=world_size,
        )


class EmbeddedText(TextDataModule):
    """Text of the installed Python packages: `docs`, technical English, or `code`, their sources. No download.

    Args:
        corpus: `docs` or `code`.
        max_bytes: Use about this many bytes of text; None for all.
        options: Those of `TextDataModule`.
    """

    def __init__(self, corpus: str = "docs", max_bytes: int | None = None, **options: Any) -> None:
        super().__init__(EmbeddedCorpus(corpus, max_bytes), **options)


class TextFiles(TextDataModule):
    """The user's own files: `.txt`, `.gz`, `.jsonl`, `.jsonl.gz`.

    Args:
        train: A path, a glob pattern, or a list of them.
        val: The same; None holds validation text out of `train`.
        test: The same; None holds test text out of `train`.
        text_field: Name of the text in a JSON row.
        holdout: Share of the training text that is held out for each missing split.
        options: Those of `TextDataModule`.
    """

    def __init__(
        self,
        train: str | Sequence[str],
        val: str | Sequence[str] | None = None,
        test: str | Sequence[str] | None = None,
        text_field: str = "text",
        holdout: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(TextFileCorpus(train, val, test, text_field, holdout), **options)


class HubText(TextDataModule):
    """A public data set by name, through Hugging Face `datasets`.

    Args:
        name: Name on the Hub, or path of a local folder of JSON, Parquet or CSV files.
        config: Configuration of the data set, such as `wikitext-2-raw-v1`.
        train: Name of its training split.
        val: Name of its validation split; None holds validation text out of `train`.
        test: Name of its test split; None holds test text out of `train`.
        text_field: Column of the text.
        rows: `documents` if each row is a document, `lines` if the rows are the lines of running text.
        holdout: Share of the training text that is held out for each missing split.
        options: Those of `TextDataModule`.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        train: str = "train",
        val: str | None = "validation",
        test: str | None = "test",
        text_field: str = "text",
        rows: str = "documents",
        holdout: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(HubCorpus(name, config, train, val, test, text_field, rows, holdout), **options)
