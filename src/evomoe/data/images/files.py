"""Images that Pillow decodes, once for all runs: folders of files, and data sets of the Hub."""

from __future__ import annotations

import os
from abc import abstractmethod
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from evomoe.data.cache import default_cache_dir
from evomoe.data.corpus import SPLITS
from evomoe.data.hub import HubDataset, load_datasets
from evomoe.data.images.decoder import Decoder
from evomoe.data.images.source import ImageSet, ImageSource, existing, with_validation
from evomoe.data.images.store import EncodedImages, build_store, open_store
from evomoe.errors import ConfigError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

TOOLS = frozenset({"__MACOSX", "__pycache__"})
"""Names of folders that hold no data, as those that begin with a dot."""


class EncodedSource(ImageSource):
    """Where images come from that have to be decoded, which the first run does for all.

    Args:
        cache_dir: Folder of the decoded images; None for the default one.
        decoder: What decodes them.
        holdout: Share of the training images of each class that is held out where there is no validation split.
    """

    def __init__(self, cache_dir: str | Path | None, decoder: Decoder, holdout: float) -> None:
        self._cache_dir = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
        self._decoder = decoder
        self._holdout = holdout
        self._store: Path | None = None

    def prepare(self) -> None:
        """Decode all images, unless the cache holds them. The files are looked at once, by the first call."""
        if self._store is None:
            splits, classes, version = self._encoded()
            train, test = splits["train"], splits["test"]
            splits = with_validation(train, test, self._holdout, splits.get("val"))
            identity = {**self.identity(), "version": version}
            self._store = build_store(splits, classes, self._decoder, identity, self._cache_dir)

    def load(self) -> ImageSet:
        """Return the decoded images, as mapped files of the cache."""
        self.prepare()
        assert self._store is not None
        return open_store(self._store)

    @abstractmethod
    def _encoded(self) -> tuple[dict[str, EncodedImages], list[str], str]:
        """Return the splits that there are, the names of the classes, and what changes when an image does."""


class ImageFolder(EncodedSource):
    """A folder for each split, in it a folder for each class, in it the images.

    Args:
        path: Folder of the folders `train`, `test`, and perhaps `val`.
        cache_dir: Folder of the decoded images.
        image_size: Height and width of the images, which are resized by their shorter side and cut to the middle; None
            if all have one size.
        channels: 3 for colours, 1 for grey.
        holdout: Share of the training images of each class that is held out where there is no folder `val`.

    Raises:
        ConfigError: Pillow is not installed, or an option is out of range.
    """

    def __init__(
        self,
        path: str | Path,
        cache_dir: str | Path | None = None,
        image_size: int | None = None,
        channels: int = 3,
        holdout: float = 0.1,
    ) -> None:
        super().__init__(cache_dir, Decoder(image_size, channels), holdout)
        self._path = existing(path)

    def identity(self) -> dict[str, Any]:
        """Return the options, without the place of the files."""
        return {"images": "folder", "holdout": self._holdout, **self._decoder.options}

    def _encoded(self) -> tuple[dict[str, EncodedImages], list[str], str]:
        classes = [folder.name for folder in self._class_folders("train")]
        version = blake2b(digest_size=16)
        root = str(self._path)
        splits = {}
        for split in SPLITS:
            if split == "val" and not (self._path / split).is_dir():
                continue
            files, labels = self._files(split, classes)
            for file in files:
                try:
                    stat = os.stat(file)
                except OSError as error:
                    raise ConfigError(f"{file} cannot be read ({error.strerror}): replace or delete it") from None
                version.update(os.fsencode(f"{os.path.relpath(file, root)}\0{stat.st_size}\0{stat.st_mtime_ns}\0"))
            splits[split] = EncodedImages(labels, partial(_file, files))
        return splits, classes, version.hexdigest()

    def _folder(self, split: str) -> Path:
        folder = self._path / split
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder}: expected data.path={self._path} to hold train and test")
        return folder

    def _class_folders(self, split: str) -> list[Path]:
        """The folders of the classes, without those that tools leave behind."""
        return sorted(path for path in self._folder(split).iterdir() if path.is_dir() and _is_data(path.name))

    def _files(self, split: str, classes: list[str]) -> tuple[list[str], np.ndarray]:
        """The images of a split, and the class of each."""
        images: list[str] = []
        labels: list[int] = []
        for folder in self._class_folders(split):
            if folder.name not in classes:
                raise ConfigError(
                    f"the class {folder.name!r} of the {split} split has no training image: add some, or leave the "
                    "class out"
                )
            files = _images_below(folder)
            if split == "train" and not files:
                raise ConfigError(
                    f"the class {folder.name!r} has no training image: add some to {folder}, or delete it"
                )
            images += files
            labels += [classes.index(folder.name)] * len(files)
        if not images:
            raise ConfigError(f"{self._path / split} holds no image: expected a folder of images for each class")
        return images, np.array(labels, dtype=np.int64)


def _images_below(folder: Path) -> list[str]:
    """The paths of the images in a folder and in those that it holds, sorted."""
    files = []
    for place, folders, names in os.walk(folder):
        folders[:] = filter(_is_data, folders)
        files += [os.path.join(place, name) for name in filter(_is_data, names)]
    return sorted(file for file in files if os.path.splitext(file)[1].lower() in SUFFIXES)


def _is_data(name: str) -> bool:
    """Whether a file or a folder is the user's own, and not what a tool has left behind."""
    return not (name.startswith(".") or name in TOOLS)


def _file(files: list[str], number: int) -> tuple[Path, str]:
    return Path(files[number]), files[number]


class HubImages(EncodedSource):
    """A data set of the Hub, or a local folder that `datasets` can read, with a column of images and one of labels.

    Args:
        name: Name on the Hub, or path of a folder.
        cache_dir: Folder of the decoded images.
        config: Configuration of the data set.
        train: Name of its training split.
        val: Name of its validation split; None holds it out of `train`.
        test: Name of its test split.
        image_field: Column of the images.
        label_field: Column of the labels.
        image_size: Height and width of the images, see `ImageFolder`.
        channels: 3 for colours, 1 for grey.
        holdout: Share of the training images of each class that is held out where `val` is None.

    Raises:
        ConfigError: A package is not installed, an option is out of range, or the data set, its configuration, a split
            or a column does not exist.
    """

    def __init__(
        self,
        name: str,
        cache_dir: str | Path | None = None,
        config: str | None = None,
        train: str = "train",
        val: str | None = None,
        test: str = "test",
        image_field: str = "image",
        label_field: str = "label",
        image_size: int | None = None,
        channels: int = 3,
        holdout: float = 0.1,
    ) -> None:
        super().__init__(cache_dir, Decoder(image_size, channels), holdout)
        self._hub = HubDataset(name, config, train, val, test)
        self._image_field = image_field
        self._label_field = label_field

    def identity(self) -> dict[str, Any]:
        """Return the options and the hash that `datasets` gives this revision of the data."""
        return {
            "images": "hub",
            **self._hub.identity(),
            "holdout": self._holdout,
            **self._decoder.options,
        }

    def _encoded(self) -> tuple[dict[str, EncodedImages], list[str], str]:
        tables = {split: self._table(split) for split in self._hub.splits}
        feature = tables["train"].features[self._label_field]
        named = hasattr(feature, "names")  # else the labels are numbers or words of any kind
        if not (named or isinstance(feature, load_datasets().Value)):
            raise ConfigError(f"data.label_field={self._label_field} holds {feature}, and no labels")
        for split, table in tables.items():
            if None in (labels := table[self._label_field][:]):
                raise ConfigError(f"row {labels.index(None)} of {split} has no label: choose another split or column")
        values = range(len(feature.names)) if named else sorted(set(tables["train"][self._label_field]))
        classes = list(feature.names) if named else [str(value) for value in values]
        numbers = {value: number for number, value in enumerate(values)}
        splits = {split: self._rows(split, table, numbers) for split, table in tables.items()}
        return splits, classes, f"{self._image_field} {self._label_field}"

    def _table(self, split: str) -> Any:
        table = self._hub.table(split)
        for key, field in (("image_field", self._image_field), ("label_field", self._label_field)):
            if field not in table.column_names:
                raise ConfigError(
                    f"data.{key}={field} is no column of {self._hub.name}; choose one of "
                    f"{', '.join(table.column_names)}"
                )
        return table

    def _rows(self, split: str, table: Any, numbers: dict[Any, int]) -> EncodedImages:
        from datasets import Image

        # The bytes, so that the decoder here can name the row of one that is broken.
        rows = table.select_columns([self._image_field]).cast_column(self._image_field, Image(decode=False))
        labels = []
        for value in table[self._label_field]:
            if value not in numbers:
                raise ConfigError(
                    f"the class {value!r} of the {split} split has no training image: add some, or leave the class out"
                )
            labels.append(numbers[value])

        def read(row: int) -> tuple[Path | bytes, str]:
            source = rows[row][self._image_field]
            if source is None:
                raise ConfigError(f"row {row} of {split} has no image: leave such rows out")
            return source["bytes"] or Path(source["path"]), f"row {row} of {split}"

        return EncodedImages(np.array(labels, dtype=np.int64), read)
