"""Lightning datamodules for language modelling on text: one base class, one subclass per source of text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from evomoe.data.corpus import Corpus, fingerprint
from evomoe.data.embedded import EmbeddedCorpus
from evomoe.data.hub import HubCorpus
from evomoe.data.sampling import Batch, ResumableDataLoader, rank_and_world_size
from evomoe.data.text_files import TextFileCorpus
from evomoe.data.token_store import TokenStore
from evomoe.data.tokenizer import Tokenizer
from evomoe.data.windows import evaluation_windows, training_windows
from evomoe.errors import ConfigError


class TextDataModule(LightningDataModule):
    """Batches of token windows from a corpus, for causal language modelling.

    Training batches are `{"tokens": (B, S + 1) int64}`; evaluation batches also hold `"valid": (B, S) bool`, False
    where the pair (input s, target s + 1) is padding. In a run of several processes, the last evaluation batch of a
    rank may be padding throughout.

    `prepare_data()` and `setup()` need no Trainer and may be called again at no cost.

    Args:
        corpus: The text.
        context: S, tokens that a model sees at once.
        batch_size: B, windows per training batch and process.
        cache_dir: Folder of the encoded corpora.
        eval_batch_size: Windows per evaluation batch and process; None for `batch_size`.
        vocab_size: Largest number of tokens of the tokenizer.
        num_workers: Processes that read batches ahead; 0 reads in the training process.
        seed: Seed of the training order.
        mask_token: Give the model one more token, after those of the tokenizer, to stand for a hidden word.

    Raises:
        ConfigError: A size is not positive.
    """

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
        super().__init__()
        self.mask_token = mask_token
        sizes = {"context": context, "batch_size": batch_size, "eval_batch_size": eval_batch_size}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ConfigError(f"data.{name}={size} must be at least 1")
        self.corpus = corpus
        self.context = context
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._requested_vocab_size = vocab_size
        self._cache_dir = Path(cache_dir).expanduser()
        self._store: TokenStore | None = None

    # -- Preparation --------------------------------------------------------------------------------------------------

    def prepare_data(self) -> None:
        """Train the tokenizer and encode the corpus, unless the cache holds them."""
        TokenStore.build(self.corpus, self._requested_vocab_size, self._cache_dir)

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Open what `prepare_data` wrote; all splits at once, whatever the stage."""
        if self._store is None:
            self._store = TokenStore(self._cache_dir / self.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that name the text and its encoding."""
        return fingerprint(TokenStore.identity_of(self.corpus, self._requested_vocab_size))

    @property
    def store(self) -> TokenStore:
        """The encoded splits."""
        if self._store is None:
            raise RuntimeError("call prepare_data() and setup() first")
        return self._store

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the corpus."""
        return self.store.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the tokenizer really has."""
        return self.tokenizer.vocab_size

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

    # -- Loaders ------------------------------------------------------------------------------------------------------

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
        """Return the validation windows in order."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test windows in order."""
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

    # -- Checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the tokenizer, for generation without the corpus, and the identity of the data, as plain values."""
        return {
            "tokenizer": self.tokenizer.to_json(),
            "fingerprint": self.fingerprint,
            "identity": self.store.identity,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint belongs to this data.

        Raises:
            ConfigError: It was trained on other text, or with another tokenizer.
        """
        if state_dict["fingerprint"] != self.fingerprint:
            there, here = _flatten(state_dict["identity"]), _flatten(self.store.identity)
            changes = [
                f"{name} {there.get(name)} -> {here.get(name)}"
                for name in sorted({*there, *here})
                if there.get(name) != here.get(name)
            ]
            more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
            raise ConfigError(
                f"the checkpoint was trained on other data ({', '.join(changes[:3])}{more}); "
                "restore these or start a new run"
            )
        if Tokenizer.from_json(state_dict["tokenizer"]).to_json() != self.tokenizer.to_json():
            raise ConfigError(
                f"the checkpoint's tokenizer is not the one in {self._cache_dir / self.fingerprint}, which another "
                "version of the tokenizers package may have trained; install that of the checkpoint, delete the folder"
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


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"a.b": 1}` for `{"a": {"b": 1}}`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
