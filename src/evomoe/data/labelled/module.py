"""Lightning datamodules for sentence classification and regression: one base class, one subclass per source."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from evomoe.data.datamodule import StoredDataModule
from evomoe.data.labelled.batches import LabelledSequences, Padding, sequence_lengths
from evomoe.data.labelled.corpus import ColumnChoice, LabelledCorpus
from evomoe.data.labelled.embedded import PACKAGES, DocstringOrigin
from evomoe.data.labelled.files import HubLabels, LabelledFiles
from evomoe.data.labelled.store import LabelledStore
from evomoe.data.sampling import (
    Batch,
    ResumableDataLoader,
    TrainingSampler,
    evaluation_loader,
    rank_and_world_size,
    training_loader,
)
from evomoe.data.two_sided import ContextLimit
from evomoe.errors import ConfigError

SHORTEST_CONTEXT = 5  # two sentences of a token each, and their markers


class LabelledDataModule(StoredDataModule[LabelledStore]):
    """Batches of labelled sequences, see `Padding`; in evaluation a sequence without a valid token is padding.

    Args:
        corpus: The labelled sentences.
        context: Most tokens of a sequence, its markers included.
        batch_size: B, sequences per training batch and process.
        cache_dir: Folder of the encoded corpora.
        eval_batch_size: Sequences per evaluation batch and process; None for `batch_size`.
        regression: Whether labels are numbers, not classes.
        too_long: Whether training sequences beyond the context are cut (`truncate`) or left out (`drop`); those of
            evaluation are cut.
        vocab_size: Largest number of tokens of the tokenizer, where none is adopted.
        num_workers: Processes that read batches ahead; 0 reads in the training process.
        seed: Seed of the training order.

    Raises:
        ConfigError: A size is too small, or `too_long` is unknown.
    """

    store_class = LabelledStore
    holds = "labelled sentences"

    def __init__(
        self,
        corpus: LabelledCorpus,
        *,
        context: int,
        batch_size: int,
        cache_dir: str | Path,
        eval_batch_size: int | None = None,
        regression: bool = False,
        too_long: str = "truncate",
        vocab_size: int = 4096,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
        super().__init__(corpus, cache_dir, vocab_size, sizes, num_workers, seed)
        if context < SHORTEST_CONTEXT:
            raise ConfigError(f"data.context={context} must be at least {SHORTEST_CONTEXT}: a marker, and a few tokens")
        self.limit = ContextLimit(context, too_long)
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.regression = regression

    @property
    def _store_options(self) -> dict[str, Any]:
        """What the store wants to know beside corpus and tokenizer."""
        return {"regression": self.regression}

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes in the order of their numbers; None for a regression."""
        return self.store.classes

    def model_sizes(self) -> dict[str, int]:
        """Return the arguments of a model that the data decide.

        As in pretraining, the vocabulary has one id more than the tokenizer: that of a hidden word.
        """
        return {"vocab_size": self.vocab_size + 1, "num_classes": 1 if self.classes is None else len(self.classes)}

    def training_ids(self) -> np.ndarray:
        """The token ids of the training split without markers, ``(N,)``."""
        return self.store.rows["train"].ids

    def training_labels(self) -> np.ndarray:
        """The labels of the training split, ``(N,)``."""
        return self.store.rows["train"].labels

    def describe(self) -> str:
        """Return one line for the log: what the sentences are, how many, and how many are too long."""
        counts = ", ".join(f"{split} {len(rows):,}" for split, rows in self.store.rows.items())
        kind = "rated by a number" if self.classes is None else f"in {len(self.classes)} classes"
        notes = "".join(f", {count:,} {name}" for name, count in self.store.notes.items())
        notes += self.limit.describe({split: self._lengths(split) for split in self.store.rows})
        things = "pairs of sentences" if self.store.pairs else "sentences"
        name = self.store.identity["corpus"]
        return f"{name}: {counts} {things} {kind}; vocabulary {self.vocab_size:,}{notes} ({self.fingerprint})"

    def meaning(self) -> dict[str, Any]:
        """Return the tokenizer, the classes, and whether rows are pairs."""
        return {**super().meaning(), "classes": self.classes, "pairs": self.store.pairs}

    def train_dataloader(self) -> ResumableDataLoader:
        """Return the shuffled training batches, whose position Lightning saves and restores."""
        sequences = self._sequences("train", self.limit.training_items(self._lengths("train"), "row"))
        identity = {
            "data fingerprint": self.fingerprint,
            "data.context": self.limit.context,
            "data.too_long": self.limit.too_long,
            "data.batch_size": self.batch_size,
        }
        rank, world_size = rank_and_world_size()
        sampler = TrainingSampler(sequences, "rows", identity, self.batch_size, self.seed, rank, world_size)
        return training_loader(sequences, sampler, self.batch_size, self.num_workers, self._padding)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation rows, in an order drawn once for all."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test rows, in an order drawn once for all."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Batch]:
        rank, world_size = rank_and_world_size()
        return evaluation_loader(
            self._sequences(split), self.eval_batch_size, self.num_workers, rank, world_size, self._padding
        )

    def _sequences(self, split: str, indices: np.ndarray | None = None) -> LabelledSequences:
        rows, separator = self.store.rows[split], self.tokenizer.end_of_text_id
        return LabelledSequences(rows, self.store.pairs, separator, self.limit.context, indices)

    def _lengths(self, split: str) -> np.ndarray:
        return sequence_lengths(self.store.rows[split], self.store.pairs)

    @property
    def _padding(self) -> Padding:
        return Padding(self.tokenizer.end_of_text_id, torch.float32 if self.classes is None else torch.int64)


class DocstringPackages(LabelledDataModule):
    """Which installed package a paragraph of documentation comes from. No download.

    Args:
        packages: Names of installed packages, the classes.
        per_class: Most training paragraphs of each; None for as many as there are.
        options: Those of `LabelledDataModule`.
    """

    def __init__(self, packages: Sequence[str] = PACKAGES, per_class: int | None = None, **options: Any) -> None:
        super().__init__(DocstringOrigin(packages, per_class), **options)


class GlueFiles(LabelledDataModule):
    """Files of GLUE, or the user's own: `.tsv`, `.tsv.gz`, `.jsonl`, `.jsonl.gz`, with one or two sentences a row.

    Args:
        train: Path of the training rows.
        val: The same for validation; None holds it out of `train`.
        test: The same for the test; None holds it out of `train`.
        sentence1: Column of the sentence, or of the first of two; None looks for the names that GLUE's files have.
        sentence2: Column of the second; None for single sentences.
        label: Column of the label; None for `label`, or that of GLUE.
        header: Names of the columns of `.tsv` files that begin without a header, as those of CoLA do.
        holdout: Share of the training rows that is held out for each missing split.
        bad_lines: Whether a malformed line is an error (`refuse`) or is left out (`drop`), see `LabelledFiles`.
        options: Those of `LabelledDataModule`.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        sentence1: str | None = None,
        sentence2: str | None = None,
        label: str | None = None,
        header: Sequence[str] | None = None,
        holdout: float = 0.05,
        bad_lines: str = "refuse",
        **options: Any,
    ) -> None:
        columns = ColumnChoice(sentence1, sentence2, label)
        super().__init__(LabelledFiles(train, val, test, columns, header, holdout, bad_lines), **options)


class HubGlue(LabelledDataModule):
    """A public data set by name, through Hugging Face `datasets`.

    Args:
        name: Name on the Hub, or path of a local folder of JSON, Parquet or CSV files.
        config: Configuration of the data set, such as `sst2`.
        train: Name of its training split.
        val: Name of its validation split; None holds it out of `train`.
        test: Name of its test split; None holds it out of `train`.
        sentence1: Column of the sentence, or of the first of two; None looks for the names that GLUE has.
        sentence2: Column of the second; None for single sentences.
        label: Column of the label; None for `label`, or that of GLUE.
        holdout: Share of the training rows that is held out for each missing split.
        options: Those of `LabelledDataModule`.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        train: str = "train",
        val: str | None = None,
        test: str | None = "validation",
        sentence1: str | None = None,
        sentence2: str | None = None,
        label: str | None = None,
        holdout: float = 0.05,
        **options: Any,
    ) -> None:
        columns = ColumnChoice(sentence1, sentence2, label)
        super().__init__(HubLabels(name, config, train, val, test, columns, holdout), **options)
