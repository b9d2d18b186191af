"""Images that were decoded once, into files that are mapped rather than read.

    <cache_dir>/<fingerprint>/
        meta.json                     identity, in it the classes, and the summary of the pixels
        train.npy  val.npy  test.npy  (N, C, H, W) uint8
        train_labels.npy  ...         (N,) int64

Data sets larger than the memory train from there, each batch from its own pages of the files alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, TaskID

from evomoe.data.cache import build_folder, damage_named, save_array
from evomoe.data.corpus import SPLITS
from evomoe.data.images.decoder import Decoder
from evomoe.data.images.source import ImageSet, PixelSummary, PixelTally, check_labels, check_square, map_images
from evomoe.errors import ConfigError

FORMAT = 1
"""Version of the files and of the decoding, part of the fingerprint."""

UNREADABLE_AT_MOST = 10
"""Images that a refusal names."""

Decoded = tuple[np.ndarray, list[list[int]]]
"""Pixels of an image, `(C, H, W)` uint8, and the counts of their values, `(C, 256)`; empty if nobody wants them."""

_IMAGES_AT_ONCE = 256  # decoded by all threads, then written


@dataclass(frozen=True)
class EncodedImages:
    """The images of a split as they are stored.

    Args:
        labels: `(N,)` int64, indices of the classes.
        read: From the number of an image to its file or its content, and to what an error message calls it.
    """

    labels: np.ndarray
    read: Callable[[int], tuple[Path | bytes, str]]

    def __getitem__(self, index: np.ndarray) -> EncodedImages:
        return EncodedImages(self.labels[index], lambda number: self.read(int(index[number])))


def build_store(
    splits: dict[str, EncodedImages], classes: list[str], decoder: Decoder, identity: dict[str, Any], cache_dir: Path
) -> Path:
    """Decode all images by all cores, unless the cache holds them already.

    Args:
        splits: `train`, `val` and `test`.
        classes: Name of each class.
        decoder: What decodes them.
        identity: Plain values that change when an image or an option does.
        cache_dir: Folder of all caches.

    Returns:
        The folder of the store.

    Raises:
        ConfigError: A split cannot be learnt, images cannot be read or have another size than the first, there is too
            little space, or `cache_dir` cannot be written.
    """
    check_labels(splits, classes)

    def write(draft: Path, progress: Progress) -> None:
        total = sum(len(split.labels) for split in splits.values())
        shape = decoder.decode(*splits["train"].read(0)).shape
        check_square(shape, f"have them cut, as by data.image_size={min(shape[1:])}")
        _check_space(draft, total * int(np.prod(shape)))
        task = progress.add_task("decoding", total=total)
        tally = PixelTally(classes, shape)
        unreadable: list[str] = []
        for name, split in splits.items():
            save_array(draft / f"{name}_labels.npy", split.labels)
            decoded = _decode(split, decoder, name == "train", progress, task)
            with (draft / f"{name}.npy").open("wb") as file:
                header = {"descr": "|u1", "fortran_order": False, "shape": (len(split.labels), *shape)}
                np.lib.format.write_array_header_1_0(file, header)
                for pixels, counts in _readable(decoded, unreadable):
                    file.write(pixels.tobytes())
                    tally.add(pixels, counts)
            tally.end_split(split.labels)
        if unreadable:
            raise ConfigError("; ".join(unreadable))
        summary = tally.summary()
        meta = {"identity": identity, "digest": summary.digest, "counts": summary.counts.tolist()}
        (draft / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    identity = {"image_format": FORMAT, "classes": classes, **identity}
    return build_folder(cache_dir, identity, write)


def open_store(directory: Path) -> ImageSet:
    """Return the images of a folder that `build_store` made.

    Raises:
        ConfigError: A file is missing or damaged.
    """
    with damage_named(directory):
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        summary = PixelSummary(meta["digest"], np.array(meta["counts"], dtype=np.int64))
        classes = meta["identity"]["classes"]
        splits = {
            name: map_images(directory / f"{name}.npy", np.load(directory / f"{name}_labels.npy")) for name in SPLITS
        }
        for name, split in splits.items():
            if len(split.images) != len(split.labels):
                raise ValueError(f"{name}.npy has {len(split.images)} images for {len(split.labels)} labels")
    return ImageSet(splits, classes, summary)


def _decode(
    split: EncodedImages, decoder: Decoder, count: bool, progress: Progress, task: TaskID
) -> Iterator[Decoded | ConfigError]:
    """Yield the pixels of each image in turn, with the counts of their values if wanted, or why it cannot be read.

    Pillow works outside of Python's lock, so that threads are enough.
    """

    def decode(number: int) -> Decoded | ConfigError:
        try:
            pixels = decoder.decode(*split.read(number))
        except ConfigError as error:
            return error
        return pixels, decoder.count(pixels) if count else []

    with ThreadPoolExecutor() as threads:
        for start in range(0, len(split.labels), _IMAGES_AT_ONCE):
            for image in threads.map(decode, range(start, min(start + _IMAGES_AT_ONCE, len(split.labels)))):
                progress.advance(task)
                yield image


def _readable(decoded: Iterable[Decoded | ConfigError], unreadable: list[str]) -> Iterator[Decoded]:
    """Yield the images up to the first that cannot be read; after it only see which others cannot, to name them too."""
    for image in decoded:
        if isinstance(image, ConfigError):
            unreadable.append(str(image))
        elif not unreadable:
            yield image
        if len(unreadable) == UNREADABLE_AT_MOST:
            raise ConfigError(f"{'; '.join(unreadable)}; perhaps there are more")


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"the decoded images need {needed / 1e9:.1f} GB in paths.cache_dir={folder.parent}, where {free / 1e9:.1f} "
            "GB are free: choose another folder, or a smaller data.image_size"
        )
