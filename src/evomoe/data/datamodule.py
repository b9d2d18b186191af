"""What datamodules share: what a checkpoint keeps of its data, and how those over a cached store are built.

`data/contract.py` says what runs, tasks and callbacks ask of a datamodule.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any, ClassVar, Generic, TypeVar

from lightning.pytorch import LightningDataModule

from evomoe.data.corpus import fingerprint, flatten
from evomoe.data.store import Store
from evomoe.data.tokenizer import Tokenizer
from evomoe.errors import ConfigError

SomeStore = TypeVar("SomeStore", bound=Store)


class IdentifiedDataModule(LightningDataModule, ABC):
    """Data that can be told from others. A checkpoint keeps which they were, and what the numbers in a batch stand for.

    `prepare_data()` and `setup()` need no Trainer and may be called again at no cost.

    Args:
        sizes: Options that must be at least 1, by name; None is no option.
        num_workers: Processes that read batches ahead; 0 reads in the training process.
        seed: Seed of the training order.

    Raises:
        ConfigError: A size is not positive.
    """

    holds: ClassVar[str]
    """What the batches are made of, which a task ``reads``."""

    trained_on: ClassVar[str] = "data.train"
    """How messages call what `meaning` follows from."""

    def __init__(self, sizes: Mapping[str, int | None], num_workers: int, seed: int) -> None:
        super().__init__()
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ConfigError(f"data.{name}={size} must be at least 1")
        self.num_workers = num_workers
        self.seed = seed

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain values from which the data follow, those first that say most to a user."""

    @property
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that name the data."""
        return fingerprint(self.identity)

    @abstractmethod
    def meaning(self) -> dict[str, Any]:
        """Return what the numbers in a batch stand for, as plain values."""

    @abstractmethod
    def adapt_to(self, state_dict: Mapping[str, Any], split: str) -> str:
        """Get ready to measure a checkpoint on these data, which may be others than its own; before `prepare_data`.

        Args:
            state_dict: What `state_dict` returned for the checkpoint.
            split: What will be measured, `val` or `test`.

        Returns:
            In what the data differ from those of the checkpoint; empty if in nothing.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return what numbers stand for, for use without the data, and which data they are, as plain values."""
        return {**self.meaning(), "fingerprint": self.fingerprint, "identity": self.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint belongs to these data.

        Raises:
            ConfigError: It was trained on others, or numbers stand for something else.
        """
        if state_dict["fingerprint"] != self.fingerprint:
            raise ConfigError(
                f"the checkpoint was trained on other data ({self.changes_since(state_dict)}); "
                "restore these or start a new run"
            )
        self.check_meaning(state_dict)

    def check_meaning(self, state_dict: Mapping[str, Any]) -> None:
        """Check that a checkpoint can be measured on these data, which may be others than those it was trained on.

        Args:
            state_dict: What `state_dict` returned for the checkpoint.

        Raises:
            ConfigError: Numbers stand for something else than in the checkpoint.
        """
        for name, here in self.meaning().items():
            there = state_dict.get(name, here)  # older checkpoints say less
            if (difference := self._difference(name, there, here)) is not None:
                raise ConfigError(difference)

    def _difference(self, name: str, there: Any, here: Any) -> str | None:
        """Say why a checkpoint's value of `meaning` is not the one here, and how to mend it; None if it is."""
        if there == here:
            return None
        return (
            f"the checkpoint was trained on other {name} ({shorten(str(there), 200)}) than this data have "
            f"({shorten(str(here), 200)}); restore {self.trained_on}"
        )

    def changes_since(self, state_dict: Mapping[str, Any], apart_from: Collection[str] = ()) -> str:
        """Say in which of the values that determine it the data differ from those of a checkpoint.

        Args:
            state_dict: What `state_dict` returned for the checkpoint.
            apart_from: Values to leave out.
        """
        there: dict[str, Any] = flatten(state_dict["identity"])
        here: dict[str, Any] = flatten(self.identity)
        changes = [
            f"{name} {there.get(name)} -> {here.get(name)}"
            for name in there | here
            if name not in apart_from and there.get(name) != here.get(name)
        ]
        return ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")


class StoredDataModule(IdentifiedDataModule, Generic[SomeStore]):
    """Text of any kind, which is encoded once and read from a cache.

    Args:
        corpus: What is encoded.
        cache_dir: Folder of the encoded corpora.
        vocab_size: Largest number of tokens of the tokenizer, where none is adopted.
        sizes: See `IdentifiedDataModule`.
        num_workers: See there.
        seed: See there.

    Raises:
        ConfigError: A size is not positive.
    """

    store_class: ClassVar[Any]

    def __init__(
        self,
        corpus: Any,
        cache_dir: str | Path,
        vocab_size: int,
        sizes: Mapping[str, int | None],
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__(sizes, num_workers, seed)
        self.corpus = corpus
        self._requested_vocab_size = vocab_size
        self._cache_dir = Path(cache_dir).expanduser()
        self._adopted: Tokenizer | None = None
        self._store: SomeStore | None = None

    @property
    def _store_options(self) -> dict[str, Any]:
        """What the store wants to know beside corpus and tokenizer."""
        return {}

    def adopt_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Encode with a given tokenizer, that of a trained model; to be called before `prepare_data`."""
        self._adopted = tokenizer

    def prepare_data(self) -> None:
        """Encode the corpus, with a tokenizer trained on it unless one was adopted, unless the cache holds it."""
        self.store_class.build(
            self.corpus, self._requested_vocab_size, self._cache_dir, self._adopted, **self._store_options
        )

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Open what `prepare_data` wrote; all splits at once, whatever the stage."""
        if self._store is None:
            self._store = self.store_class(self._cache_dir / self.fingerprint)

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values from which the text and its encoding follow; their fingerprint names the folder of the cache."""
        return self.store_class.identity_of(
            self.corpus, self._requested_vocab_size, self._adopted, **self._store_options
        )

    @property
    def store(self) -> SomeStore:
        """The encoded splits."""
        if self._store is None:
            raise RuntimeError("call prepare_data() and setup() first")
        return self._store

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that encodes the corpus."""
        return self.store.tokenizer

    @property
    def vocab_size(self) -> int:
        """Number of tokens that the tokenizer really has."""
        return self.tokenizer.vocab_size

    def meaning(self) -> dict[str, Any]:
        """Return what the numbers in a batch stand for, as plain values: the tokenizer."""
        return {"tokenizer": self.tokenizer.to_json()}

    def adapt_to(self, state_dict: Mapping[str, Any], split: str) -> str:
        """Have text that is not the checkpoint's be encoded by the checkpoint's tokenizer; before `prepare_data`.

        Args:
            state_dict: What `state_dict` returned for the checkpoint.
            split: What will be measured, `val` or `test`.

        Returns:
            In what the text differs from that of the checkpoint; empty if in nothing.

        Raises:
            ConfigError: The split is held out of a training text that is another one.
        """
        if state_dict["fingerprint"] == self.fingerprint:
            return ""
        # A run that began with a pretrained model had another tokenizer than one of this text, too.
        self.adopt_tokenizer(Tokenizer.from_json(state_dict["tokenizer"]))
        changes = self.changes_since(state_dict, apart_from=("tokenizer", "vocab_size"))
        if changes and split in self.corpus.held_out:
            raise ConfigError(
                f"split={split} would be held out of a text that is not the one of the run ({changes}), which may have "
                f'been trained on all of it: give a file for it, as in overrides="data.{split}=FILE"'
            )
        return changes

    def _difference(self, name: str, there: Any, here: Any) -> str | None:
        if name != "tokenizer":
            return super()._difference(name, there, here)
        if Tokenizer.from_json(there).to_json() == here:  # as this version of the library writes it
            return None
        return (
            f"the checkpoint's tokenizer is not the one in {self._cache_dir / self.fingerprint}, which another "
            "version of the tokenizers package may have trained; install that of the checkpoint, delete the folder"
        )
