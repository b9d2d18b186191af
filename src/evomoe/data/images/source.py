"""What a set of labelled images is: three splits of equal-sized images, checked before training.

Shapes: N images, C channels, H height, W width.
"""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from evomoe.errors import ConfigError

HOLDOUT_SEED = 0
"""Of the draw that holds out a split: the same for all runs, so that their results are about the same images."""

_IMAGES_AT_ONCE = 256  # whose pixels are counted as 64-bit integers


def existing(path: str | Path) -> Path:
    """Return `data.path` as a path.

    Raises:
        ConfigError: There is nothing.
    """
    found = Path(path).expanduser()
    if not found.exists():
        raise ConfigError(f"data.path={path} does not exist (seen from {Path.cwd()})")
    return found


def check_square(shape: tuple[int, ...], remedy: str) -> None:
    """Refuse images `(C, H, W)` whose sides differ.

    Raises:
        ConfigError: They do.
    """
    _, height, width = shape
    if height != width:
        raise ConfigError(f"the images have {height} x {width} pixels: expected square ones; {remedy}")


class Labelled(Protocol):
    """Items with a class each, of which some can be chosen."""

    @property
    def labels(self) -> np.ndarray:
        """`(N,)` int64, indices of the classes."""

    def __getitem__(self: Split, index: np.ndarray) -> Split: ...


Split = TypeVar("Split", bound=Labelled)


@dataclass(frozen=True)
class LabelledImages:
    """A split. One whose images are a mapped file travels to another process as the file's path.

    Args:
        images: `(N, C, H, W)` uint8, in memory or mapped from a whole `.npy` file.
        labels: `(N,)` int64, indices of the classes.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: np.ndarray) -> LabelledImages:
        return LabelledImages(self.images[index], self.labels[index])

    def __reduce__(self) -> tuple[Any, ...]:
        if isinstance(self.images, np.memmap) and isinstance(self.images.base, mmap.mmap):
            return map_images, (self.images.filename, self.labels)
        return LabelledImages, (self.images, self.labels)


def map_images(path: str | Path, labels: np.ndarray) -> LabelledImages:
    """Return a split whose images are those of an `.npy` file, read when they are asked for."""
    return LabelledImages(np.load(path, mmap_mode="r"), labels)


@dataclass(frozen=True)
class PixelSummary:
    """What reading all pixels once told.

    Args:
        digest: Hexadecimal digits that depend on all pixels, labels and names of classes.
        counts: `(C, 256)` int64, how many training pixels of each channel have each value.
    """

    digest: str
    counts: np.ndarray


class PixelTally:
    """Makes the summary while the pixels pass by, split after split.

    Args:
        classes: Name of each class.
        shape: Channels, height and width of every image.
    """

    def __init__(self, classes: list[str], shape: tuple[int, ...]) -> None:
        self._digest = blake2b(repr((classes, shape)).encode(), digest_size=16)
        self._counts = np.zeros((shape[0], 256), np.int64)

    def add(self, images: np.ndarray, counts: Any) -> None:
        """Take further images, with the counts of their values, `(C, 256)`; empty for those that do not train."""
        self._digest.update(np.ascontiguousarray(images).data)
        if len(counts):
            self._counts += counts

    def end_split(self, labels: np.ndarray) -> None:
        """Take the labels of the images since the last split."""
        self._digest.update(np.ascontiguousarray(labels).data)

    def summary(self) -> PixelSummary:
        """Return what was seen."""
        return PixelSummary(self._digest.hexdigest(), self._counts)


@dataclass(frozen=True)
class ImageSet:
    """Images in three splits.

    Args:
        splits: `train`, `val` and `test`, in this order.
        classes: Name of each class.
        known: Their summary, where it was stored with them; None to make it when it is asked for.

    Raises:
        ConfigError: A split is empty or of another image size, a label is no class, or a class of another split has no
            training image.
    """

    splits: dict[str, LabelledImages]
    classes: list[str]
    known: PixelSummary | None = None

    def __post_init__(self) -> None:
        check_labels(self.splits, self.classes)
        train = self.splits["train"]
        for name, split in self.splits.items():
            if split.images.shape[1:] != train.images.shape[1:]:
                raise ConfigError(
                    f"the {name} split has images of {_size(split)} and the training split of {_size(train)}: give all "
                    "images one size"
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        channels, height, width = self.splits["train"].images.shape[1:]
        return channels, height, width

    @cached_property
    def summary(self) -> PixelSummary:
        """What reading all pixels once tells."""
        if self.known is not None:
            return self.known
        tally = PixelTally(self.classes, self.shape)
        for name, split in self.splits.items():
            for start in range(0, len(split), _IMAGES_AT_ONCE):
                images = split.images[start : start + _IMAGES_AT_ONCE]
                planes = images.swapaxes(0, 1) if name == "train" else ()
                tally.add(images, [np.bincount(plane.ravel(), minlength=256) for plane in planes])
            tally.end_split(split.labels)
        return tally.summary()


def check_labels(splits: Mapping[str, Labelled], classes: list[str]) -> None:
    """Refuse splits that cannot be learnt.

    Raises:
        ConfigError: One is empty, a label is no class, or a class of another split has no training image.
    """
    for name, split in splits.items():
        if len(split.labels) == 0:
            raise ConfigError(f"the {name} split has no image: give more of them, or another data.holdout")
        unknown = split.labels[(split.labels < 0) | (split.labels >= len(classes))]
        if len(unknown):
            raise ConfigError(
                f"the {name} split has the label {unknown[0]}, and there are {len(classes)} classes: expected labels "
                f"from 0 to {len(classes) - 1}"
            )
    counts = np.bincount(splits["train"].labels, minlength=len(classes))
    for name, split in splits.items():
        untrained = np.unique(split.labels[counts[split.labels] == 0])
        if len(untrained):
            raise ConfigError(
                f"the class {classes[untrained[0]]!r} of the {name} split has no training image: add some, or leave "
                "the class out"
            )


class ImageSource(ABC):
    """Where labelled images come from."""

    def prepare(self) -> None:  # noqa: B027
        """Download and decode what is missing; of several processes at once one does it while the others wait."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return the options in plain values, for the message about a checkpoint of other data."""

    @abstractmethod
    def load(self) -> ImageSet:
        """Return all splits, in memory or as mapped files."""


def hold_out(labels: np.ndarray, shares: dict[str, float], seed: int = HOLDOUT_SEED) -> dict[str, np.ndarray]:
    """Draw splits in which every class has its share.

    Args:
        labels: `(N,)` class of each item.
        shares: Share of each split that is held out, by its name.
        seed: Of the draw.

    Returns:
        Ascending indices of the items of each split, those that remain under `train`. Of a class with n items a split
        gets its share, rounded to the nearest number.

    Raises:
        ConfigError: A share is not above 0, or nothing would be left to train on.
    """
    if min(shares.values()) <= 0 or sum(shares.values()) >= 1:
        given = ", ".join(f"{share:g} for {name}" for name, share in shares.items())
        raise ConfigError(f"data.holdout: expected shares above 0 that leave images to train on, and got {given}")
    generator = np.random.default_rng(seed)
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("train", *shares)}
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        ends = np.rint(np.cumsum([0.0, *shares.values()]) * len(members)).astype(int)
        for name, start, end in zip(shares, ends[:-1], ends[1:], strict=True):
            parts[name].append(members[start:end])
        parts["train"].append(members[ends[-1] :])
    empty = np.empty(0, dtype=np.int64)  # of a split without images, which is refused where its name is known
    return {name: np.sort(np.concatenate([empty, *members])) for name, members in parts.items()}


def with_validation(train: Split, test: Split, holdout: float, val: Split | None = None) -> dict[str, Split]:
    """Return all splits, with validation images held out of the training images unless they are given."""
    if val is None:
        indices = hold_out(train.labels, {"val": holdout})
        train, val = train[indices["train"]], train[indices["val"]]
    return {"train": train, "val": val, "test": test}


def _size(split: LabelledImages) -> str:
    return " x ".join(str(size) for size in split.images.shape[1:])
