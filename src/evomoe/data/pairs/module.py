"""Lightning datamodules for translation: one base class, one subclass per source of sentence pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from evomoe.data.datamodule import StoredDataModule
from evomoe.data.pairs.batches import BatchList, BucketSampler, PairBatches, evaluation_batches, sample_batches
from evomoe.data.pairs.cldr import LocalePairs
from evomoe.data.pairs.corpus import HubPairs, PairCorpus, ParallelFiles
from evomoe.data.pairs.store import PairStore
from evomoe.data.sampling import Batch, ResumableDataLoader, evaluation_loader, rank_and_world_size, training_loader
from evomoe.data.two_sided import ContextLimit


class PairDataModule(StoredDataModule[PairStore]):
    """Batches of sentence pairs of about one length, for translation; see `PairBatches` for what they hold.

    Args:
        corpus: The pairs.
        context: Most tokens of a side, its end included.
        batch_tokens: Most tokens of a side of a training batch and process, padding included.
        cache_dir: Folder of the encoded corpora.
        eval_batch_tokens: The same for evaluation; None for `batch_tokens`.
        too_long: Whether a training pair with a side beyond the context is cut (`truncate`) or left out (`drop`). In
            evaluation a source is cut, and its translation is held against the whole reference.
        vocab_size: Largest number of tokens of the tokenizer, of both languages together, where none is adopted.
        num_workers: Processes that read batches ahead; 0 reads in the training process.
        seed: Seed of the training order.

    Raises:
        ConfigError: A size is not positive, or `too_long` is unknown.
    """

    store_class = PairStore
    holds = "sentence pairs"

    def __init__(
        self,
        corpus: PairCorpus,
        *,
        context: int,
        batch_tokens: int,
        cache_dir: str | Path,
        eval_batch_tokens: int | None = None,
        too_long: str = "truncate",
        vocab_size: int = 4096,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        sizes = {"context": context, "batch_tokens": batch_tokens, "eval_batch_tokens": eval_batch_tokens}
        super().__init__(corpus, cache_dir, vocab_size, sizes, num_workers, seed)
        self.limit = ContextLimit(context, too_long)
        self.batch_tokens = batch_tokens
        self.eval_batch_tokens = batch_tokens if eval_batch_tokens is None else eval_batch_tokens

    def model_sizes(self) -> dict[str, int]:
        """Return the arguments of a model that the data decide."""
        return {"vocab_size": self.vocab_size}

    def training_ids(self) -> np.ndarray:
        """The token ids of the training split, both languages, memory-mapped, ``(N,)``."""
        return self.store.pairs("train").ids()

    def texts(self, split: str, index: int) -> tuple[str, str]:
        """Return source and reference of a pair, whole, as they were read.

        Args:
            split: `train`, `val` or `test`.
            index: Number of the pair, as in a batch's `"index"`.
        """
        source, target = self.store.pairs(split)[index]
        return self.tokenizer.decode(source.tolist()), self.tokenizer.decode(target.tolist())

    def sample(self, split: str, count: int) -> list[Batch]:
        """Return this process's share of `count` pairs drawn from a whole split, the same every time, in batches.

        Args:
            split: `train`, `val` or `test`.
            count: Pairs for all processes together; all of the split if it has less.
        """
        lengths = self._lengths(split).clip(max=self.limit.context)
        pairs = self._batches(split)
        batches = sample_batches(lengths, count, self.eval_batch_tokens, *rank_and_world_size())
        return [pairs[batch] for batch in batches]

    def describe(self) -> str:
        """Return one line for the log: what the pairs are, how many, and how many are too long."""
        counts = ", ".join(
            f"{split} {count.pairs:,} pairs = {count.source_tokens / 1e6:.2f} M + {count.target_tokens / 1e6:.2f} M "
            "tokens"
            for split, count in self.store.counts.items()
        )
        notes = "".join(f", {count:,} {name}" for name, count in self.store.notes.items())
        notes += self.limit.describe({split: self._lengths(split) for split in self.store.counts})
        languages = f"{self.corpus.source} to {self.corpus.target}"
        name = self.store.identity["corpus"]
        return f"{name}, {languages}: {counts}; vocabulary {self.vocab_size:,}{notes} ({self.fingerprint})"

    def train_dataloader(self) -> ResumableDataLoader:
        """Return the shuffled training batches, whose position Lightning saves and restores."""
        lengths = self._lengths("train")
        indices = self.limit.training_items(lengths, "pair")
        identity = {
            "data fingerprint": self.fingerprint,
            "data.context": self.limit.context,
            "data.too_long": self.limit.too_long,
        }
        rank, world_size = rank_and_world_size()
        sampler = BucketSampler(
            lengths[indices].clip(max=self.limit.context),
            indices,
            identity,
            self.batch_tokens,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )
        return training_loader(self._batches("train"), sampler, batch_size=None, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation batches, in an order drawn once for all."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test batches, in an order drawn once for all."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Batch]:
        rank, world_size = rank_and_world_size()
        lengths = self._lengths(split).clip(max=self.limit.context)
        batches = BatchList(self._batches(split), evaluation_batches(lengths, self.eval_batch_tokens, world_size))
        return evaluation_loader(
            batches, batch_size=None, num_workers=self.num_workers, rank=rank, world_size=world_size
        )

    def _batches(self, split: str) -> PairBatches:
        return PairBatches(self.store.pairs(split), self.tokenizer.end_of_text_id, self.limit.context)

    def _lengths(self, split: str) -> np.ndarray:
        """Tokens of the longer side of each pair, with its end, ``(N,)``."""
        return self.store.pairs(split).lengths().max(axis=1) + 1


class EmbeddedPairs(PairDataModule):
    """Dates, times, numbers, amounts, measures and lists in two languages, without a download.

    Args:
        source: Language that is translated from, as a CLDR locale such as `en` or `pt_BR`.
        target: Language that is translated to.
        pairs: Draws; a few less become pairs.
        options: Those of `PairDataModule`.
    """

    def __init__(self, source: str = "en", target: str = "de", pairs: int = 60_000, **options: Any) -> None:
        super().__init__(LocalePairs(source, target, pairs), **options)


class PairFiles(PairDataModule):
    """The user's own files, line by line: `data.train=multi30k/train` reads `multi30k/train.de` and `.en`, or `.gz`.

    Args:
        source: Ending of the files of the source language.
        target: Ending of the files of the target language.
        train: Path of the training files without their endings.
        val: The same for validation; None holds validation pairs out of `train`.
        test: The same for the test; None holds test pairs out of `train`.
        holdout: Share of the training pairs that is held out for each missing split.
        options: Those of `PairDataModule`.
    """

    def __init__(
        self,
        source: str,
        target: str,
        train: str,
        val: str | None = None,
        test: str | None = None,
        holdout: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(ParallelFiles(source, target, train, val, test, holdout), **options)


class HubTranslation(PairDataModule):
    """A public data set of translations by name, through Hugging Face `datasets`.

    Args:
        source: Column, or key of the column `translation`, of the source language.
        target: The same of the target language.
        name: Name on the Hub, or path of a local folder of JSON, Parquet or CSV files.
        config: Configuration of the data set, such as `de-en`.
        train: Name of its training split.
        val: Name of its validation split; None holds validation pairs out of `train`.
        test: Name of its test split; None holds test pairs out of `train`.
        holdout: Share of the training pairs that is held out for each missing split.
        options: Those of `PairDataModule`.
    """

    def __init__(
        self,
        source: str,
        target: str,
        name: str,
        config: str | None = None,
        train: str = "train",
        val: str | None = "validation",
        test: str | None = "test",
        holdout: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(HubPairs(source, target, name, config, train, val, test, holdout), **options)
