"""What the datamodules over a cached store share: building it, its tokenizer, and what a checkpoint keeps of it."""

from __future__ import annotations

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


class StoredDataModule(LightningDataModule, Generic[SomeStore]):
    """Data that are encoded once and read from a cache.

    `prepare_data()` and `setup()` need no Trainer and may be called again at no cost.

    Args:
        corpus: What is encoded.
        cache_dir: Folder of the encoded corpora.
        vocab_size: Largest number of tokens of the tokenizer, where none is adopted.
        sizes: Options that must be at least 1, by name; None is no option.
        num_workers: Processes that read batches ahead; 0 reads in the training process.
        seed: Seed of the training order.

    Raises:
        ConfigError: A size is not positive.
    """

    store_class: ClassVar[Any]
    holds: ClassVar[str]
    """What the batches are made of, which a task ``reads``."""

    def __init__(
        self,
        corpus: Any,
        cache_dir: str | Path,
        vocab_size: int,
        sizes: dict[str, int | None],
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ConfigError(f"data.{name}={size} must be at least 1")
        self.corpus = corpus
        self.num_workers = num_workers
        self.seed = seed
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
    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that name the text and its encoding."""
        return fingerprint(self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values from which the text and its encoding follow."""
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

    def state_dict(self) -> dict[str, Any]:
        """Return what numbers stand for, for use without the corpus, and the identity of the data, as plain values."""
        return {**self.meaning(), "fingerprint": self.fingerprint, "identity": self.store.identity}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint belongs to this data.

        Raises:
            ConfigError: It was trained on other text, or with another tokenizer.
        """
        if state_dict["fingerprint"] != self.fingerprint:
            raise ConfigError(
                f"the checkpoint was trained on other data ({self.changes_since(state_dict)}); "
                "restore these or start a new run"
            )
        self.check_meaning(state_dict)

    def check_meaning(self, state_dict: dict[str, Any]) -> None:
        """Check that a checkpoint can be measured on this data, whose texts may be others than those it is of.

        Args:
            state_dict: What `state_dict` returned for the checkpoint.

        Raises:
            ConfigError: Numbers stand for something else than in the checkpoint.
        """
        if Tokenizer.from_json(state_dict["tokenizer"]).to_json() != self.tokenizer.to_json():
            raise ConfigError(
                f"the checkpoint's tokenizer is not the one in {self._cache_dir / self.fingerprint}, which another "
                "version of the tokenizers package may have trained; install that of the checkpoint, delete the folder"
            )
        for name, here in self.meaning().items():
            there = state_dict[name]
            if name != "tokenizer" and here != there:
                raise ConfigError(
                    f"the checkpoint was trained on other {name} ({shorten(str(there), 200)}) than this data have "
                    f"({shorten(str(here), 200)}); restore data.train"
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
            for name in sorted({*there, *here} - {*apart_from})
            if there.get(name) != here.get(name)
        ]
        return ", ".join(changes[:3]) + (f" and {len(changes) - 3} more" if len(changes) > 3 else "")
