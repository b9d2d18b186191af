"""A few images of two colours, in every format that can be read."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from evomoe.data.images.source import ImageSet, ImageSource, LabelledImages


def draw(count: int, channels: int = 3, size: int = 8, classes: int = 3, seed: int = 0) -> LabelledImages:
    """Images of noise whose first pixel is their class."""
    labels = np.arange(count) % classes
    images = np.random.default_rng(seed).integers(0, 256, (count, channels, size, size)).astype(np.uint8)
    images[:, :, 0, 0] = labels[:, None]
    return LabelledImages(images, labels.astype(np.int64))


class Drawn(ImageSource):
    """The same as a source."""

    def __init__(self, train: int = 30, val: int = 6, test: int = 7, **options: Any) -> None:
        self.counts = {"train": train, "val": val, "test": test}
        self.options = options

    def identity(self) -> dict[str, Any]:
        return {"images": "drawn", **self.options}

    def load(self) -> ImageSet:
        splits = {
            split: draw(count, seed=seed, **self.options) for seed, (split, count) in enumerate(self.counts.items())
        }
        return ImageSet(splits, ["red", "green", "blue"])


def write_idx(path: Path, array: np.ndarray) -> None:
    """An IDX file; packed if its name ends in .gz."""
    header = (0x0800 + array.ndim).to_bytes(4, "big") + b"".join(size.to_bytes(4, "big") for size in array.shape)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def write_mnist(folder: Path, ending: str = "") -> dict[str, LabelledImages]:
    """The four files."""
    splits = {"train": draw(30, channels=1), "t10k": draw(9, channels=1, seed=1)}
    for prefix, split in splits.items():
        write_idx(folder / f"{prefix}-images-idx3-ubyte{ending}", split.images[:, 0])
        write_idx(folder / f"{prefix}-labels-idx1-ubyte{ending}", split.labels)
    return splits


def write_folder(folder: Path, splits: dict[str, LabelledImages], names: list[str]) -> None:
    """A PNG for each image in a folder for its class."""
    from PIL import Image

    for split, content in splits.items():
        for number, (image, label) in enumerate(zip(content.images, content.labels, strict=True)):
            place = folder / split / names[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.transpose(1, 2, 0)).save(place / f"{number:03}.png")
