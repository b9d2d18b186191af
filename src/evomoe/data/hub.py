"""Public data sets by name, through Hugging Face `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from types import ModuleType
from typing import Any

from evomoe.data.corpus import SPLITS
from evomoe.errors import ConfigError


class HubDataset:
    """A data set of the Hub, or a local folder that `datasets` can read, and the splits of it that are read.

    Args:
        name: Name on the Hub, or path of a folder.
        config: Configuration of the data set.
        train: Name of its training split.
        val: Name of its validation split; None where it has none.
        test: Name of its test split; None where it has none.
    """

    def __init__(self, name: str, config: str | None, train: str, val: str | None, test: str | None) -> None:
        self.name = name
        self.config = config
        given = {"train": train, "val": val, "test": test}
        self.splits = {split: source for split, source in given.items() if source is not None}

    @property
    def missing(self) -> list[str]:
        """Return the splits that have to be held out of training."""
        return [split for split in SPLITS if split not in self.splits]

    @cached_property
    def builder(self) -> Any:
        """Return what downloads and reads it.

        Raises:
            ConfigError: `datasets` is not installed, or the data set or its configuration does not exist.
        """
        with _failure_named(f"data.name={self.name}, data.config={self.config}"):
            return load_datasets().load_dataset_builder(self.name, self.config)

    def identity(self) -> dict[str, Any]:
        """Return the choice, and the hash that `datasets` gives this revision of the data."""
        return {"name": self.name, "config": self.config, "revision": self.builder.hash, "splits": self.splits}

    def describe(self, split: str) -> str:
        """Name a split as the user did."""
        return f"data.{split}={self.splits[split]} of {self.name}"

    def table(self, split: str) -> Any:
        """Read a split; the first call downloads the data set.

        Raises:
            ConfigError: There is no such split, it cannot be had, or it is also trained on.
        """
        with _failure_named(self.describe(split)):
            self.builder.download_and_prepare()
            table = self.builder.as_dataset(split=self.splits[split])
            shared = split != "train" and self._overlap(self._parts(split), self._parts("train"))
        if shared:
            raise ConfigError(
                f"{self.describe(split)} is also trained on, as {self.describe('train')}: give splits without a common "
                "row, as in data.train='train[10%:]' data.val='train[:10%]'"
            )
        return table

    def _parts(self, split: str) -> list[Any]:
        """Ranges of rows that a split is made of, as `splitname`, `from_` and `to`."""
        rows = {name: info.num_examples for name, info in self.builder.info.splits.items()}
        choice = self.splits[split]
        choice = "+".join(rows) if choice == "all" else choice
        return list(load_datasets().ReadInstruction.from_spec(choice).to_absolute(rows))

    @staticmethod
    def _overlap(some: list[Any], others: list[Any]) -> bool:
        return any(
            one.splitname == other.splitname and max(one.from_, other.from_) < min(one.to, other.to)
            for one in some
            for other in others
        )


@contextmanager
def _failure_named(what: str) -> Iterator[None]:
    """Raise a `ConfigError` for what `datasets` raises: where it only says that something failed, for the cause."""
    from_datasets = load_datasets().exceptions.DatasetsError
    try:
        yield
    except (ValueError, OSError, RuntimeError, from_datasets) as error:
        raise ConfigError(f"{what}: {first_line(error.__cause__ or error)}") from error


def load_datasets() -> ModuleType:
    """Import the optional package.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise ConfigError('data of the Hub need the package datasets; run pip install -e ".[hub]"') from error
    return datasets


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return str(error).strip().partition("\n")[0]
