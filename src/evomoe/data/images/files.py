"""Images that Pillow decodes: folders of files, and data sets of the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from evomoe.data.hub import HubDataset, first_line
from evomoe.data.images.source import ImageSet, ImageSource, LabelledImages, existing, with_validation
from evomoe.errors import ConfigError

SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})

TOOLS = frozenset({"__MACOSX", "__pycache__"})
"""Names of folders that are no classes, as those that begin with a dot."""


class ImageFolder(ImageSource):
    """A folder for each split, in it a folder for each class, in it the images.

    Args:
        path: Folder of the folders `train`, `test`, and perhaps `val`.
        image_size: Height and width of the images, which are resized by their shorter side and cut to the middle; None
            if all have one size.
        channels: 3 for colours, 1 for grey.
        holdout: Share of the training images of each class that is held out where there is no folder `val`.

    Raises:
        ConfigError: Pillow is not installed, or an option is out of range.
    """

    def __init__(
        self, path: str | Path, image_size: int | None = None, channels: int = 3, holdout: float = 0.1
    ) -> None:
        self._path = existing(path)
        self._decoder = Decoder(image_size, channels)
        self._holdout = holdout

    def identity(self) -> dict[str, Any]:
        """Return the options, without the place of the files."""
        return {"images": "folder", "holdout": self._holdout, **self._decoder.options}

    def load(self) -> ImageSet:
        """Decode all images."""
        classes = [folder.name for folder in self._class_folders("train")]
        val = self._read("val", classes) if (self._path / "val").is_dir() else None
        return with_validation(self._read("train", classes), self._read("test", classes), classes, self._holdout, val)

    def _folder(self, split: str) -> Path:
        folder = self._path / split
        if not folder.is_dir():
            raise ConfigError(f"there is no folder {folder}: expected data.path={self._path} to hold train and test")
        return folder

    def _class_folders(self, split: str) -> list[Path]:
        """The folders of the classes, without those that tools leave behind."""
        folders = (path for path in self._folder(split).iterdir() if path.is_dir())
        return sorted(path for path in folders if not (path.name.startswith(".") or path.name in TOOLS))

    def _read(self, split: str, classes: list[str]) -> LabelledImages:
        images, labels = [], []
        for folder in self._class_folders(split):
            if folder.name not in classes:
                raise ConfigError(
                    f"the class {folder.name!r} of the {split} split has no training image: add some, or leave the "
                    "class out"
                )
            files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
            if split == "train" and not files:
                raise ConfigError(
                    f"the class {folder.name!r} has no training image: add some to {folder}, or delete it"
                )
            for file in files:
                images.append(self._decoder.decode(file, str(file)))
                labels.append(classes.index(folder.name))
        if not images:
            raise ConfigError(f"{self._path / split} holds no image: expected a folder of images for each class")
        return self._decoder.stack(images, labels)


class HubImages(ImageSource):
    """A data set of the Hub, or a local folder that `datasets` can read, with a column of images and one of labels.

    Args:
        name: Name on the Hub, or path of a folder.
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
        self._hub = HubDataset(name, config, train, val, test)
        self._image_field = image_field
        self._label_field = label_field
        self._decoder = Decoder(image_size, channels)
        self._holdout = holdout

    def prepare(self) -> None:
        """Download the data set."""
        self._hub.table("train")

    def identity(self) -> dict[str, Any]:
        """Return the options and the hash that `datasets` gives this revision of the data."""
        return {
            "images": "hub",
            **self._hub.identity(),
            "holdout": self._holdout,
            **self._decoder.options,
        }

    def load(self) -> ImageSet:
        """Decode all images."""
        tables = {split: self._table(split) for split in self._hub.splits}
        feature = tables["train"].features[self._label_field]
        named = hasattr(feature, "names")  # else the labels are numbers or words of any kind
        values = range(len(feature.names)) if named else sorted(set(tables["train"][self._label_field]))
        classes = list(feature.names) if named else [str(value) for value in values]
        numbers = {value: number for number, value in enumerate(values)}
        splits = {split: self._read(split, table, numbers) for split, table in tables.items()}
        return with_validation(splits["train"], splits["test"], classes, self._holdout, splits.get("val"))

    def _table(self, split: str) -> Any:
        table = self._hub.table(split)
        for key, field in (("image_field", self._image_field), ("label_field", self._label_field)):
            if field not in table.column_names:
                raise ConfigError(
                    f"data.{key}={field} is no column of {self._hub.name}; choose one of "
                    f"{', '.join(table.column_names)}"
                )
        return table

    def _read(self, split: str, table: Any, numbers: dict[Any, int]) -> LabelledImages:
        from datasets import Image

        # The bytes, so that the decoder here can name the row of one that is broken.
        rows = table.cast_column(self._image_field, Image(decode=False))
        images, labels = [], []
        for row, item in enumerate(rows):
            source = item[self._image_field]
            images.append(self._decoder.decode(source["bytes"] or Path(source["path"]), f"row {row} of {split}"))
            value = item[self._label_field]
            if value not in numbers:
                raise ConfigError(
                    f"the class {value!r} of the {split} split has no training image: add some, or leave the class out"
                )
            labels.append(numbers[value])
        return self._decoder.stack(images, labels)


class Decoder:
    """Turns encoded images into arrays of one shape.

    Args:
        image_size: Height and width, or None if all images have one size.
        channels: 3 for colours, 1 for grey.

    Raises:
        ConfigError: Pillow is not installed, or an option is out of range.
    """

    def __init__(self, image_size: int | None, channels: int) -> None:
        if image_size is not None and image_size < 1:
            raise ConfigError(f"data.image_size={image_size} must be at least 1, or null for the size of the files")
        if channels not in (1, 3):
            raise ConfigError(f"data.channels={channels}: expected 3 for colours or 1 for grey")
        self._pillow = _load_pillow()
        from PIL.ImageOps import exif_transpose  # cameras write how they were held

        self._upright = exif_transpose
        self.options = {"image_size": image_size, "channels": channels}
        self._image_size = image_size
        self._mode = "RGB" if channels == 3 else "L"
        self._first: tuple[str, tuple[int, ...]] | None = None

    def decode(self, source: Path | bytes, name: str) -> np.ndarray:
        """Return an image as `(C, H, W)` uint8.

        Args:
            source: A file, or its content.
            name: What an error message calls it.

        Raises:
            ConfigError: It is no image, or of another size than the first one.
        """
        try:
            with self._pillow.open(source if isinstance(source, Path) else BytesIO(source)) as opened:
                kind = opened.mode
                image = self._upright(opened).convert(self._mode)
        except (OSError, ValueError, SyntaxError, self._pillow.DecompressionBombError) as error:
            reason = "" if isinstance(error, self._pillow.UnidentifiedImageError) else f" ({first_line(error)})"
            raise ConfigError(f"{name} is no image that can be read{reason}: replace or delete it") from None
        if kind.startswith(("I", "F")):  # which Pillow would clip to 255
            raise ConfigError(f"{name} has pixels of more than 8 bits (mode {kind}): convert it to 8 bits a channel")
        if self._image_size is not None:
            image = self._resize(image, self._image_size)
        pixels = np.asarray(image)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        first_name, shape = self._first = self._first or (name, pixels.shape)
        if pixels.shape != shape:
            raise ConfigError(
                f"{name} has {pixels.shape[1]} x {pixels.shape[2]} pixels and {first_name} {shape[1]} x {shape[2]}: "
                f"set data.image_size, as in data.image_size={min(shape[1:])}"
            )
        return pixels

    def stack(self, images: Sequence[np.ndarray], labels: Sequence[int]) -> LabelledImages:
        """Return decoded images and their classes as a split."""
        return LabelledImages(np.stack(images), np.array(labels, dtype=np.int64))

    def _resize(self, image: Any, size: int) -> Any:
        """Scale the shorter side to `size`, and cut a square out of the middle."""
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        return image.resize((width, height), self._pillow.Resampling.BICUBIC).crop((left, top, left + size, top + size))


def _load_pillow() -> ModuleType:
    try:
        import PIL.Image
    except ImportError as error:
        raise ConfigError('image files need the package Pillow; run pip install -e ".[vision]"') from error
    return PIL.Image
