"""Public data sets by name, through Hugging Face `datasets`."""

from __future__ import annotations

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
        try:
            return load_datasets().load_dataset_builder(self.name, self.config)
        except (ValueError, OSError) as error:
            raise ConfigError(f"data.name={self.name}, data.config={self.config}: {first_line(error)}") from error

    def identity(self) -> dict[str, Any]:
        """Return the choice, and the hash that `datasets` gives this revision of the data."""
        return {"name": self.name, "config": self.config, "revision": self.builder.hash, "splits": self.splits}

    def describe(self, split: str) -> str:
        """Name a split as the user did."""
        return f"data.{split}={self.splits[split]} of {self.name}"

    def table(self, split: str) -> Any:
        """Read a split; the first call downloads the data set.

        Raises:
            ConfigError: There is no such split, or it cannot be had.
        """
        try:
            self.builder.download_and_prepare()
            return self.builder.as_dataset(split=self.splits[split])
        except (ValueError, OSError) as error:
            raise ConfigError(f"{self.describe(split)}: {first_line(error)}") from error


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


def first_line(error: Exception) -> str:
    """Return what an error says, in one line."""
    return str(error).strip().partition("\n")[0]
