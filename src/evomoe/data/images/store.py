"""Images that were decoded once, into files that are mapped rather than read.

    <cache_dir>/<fingerprint>/
        meta.json                     names of the classes, and the summary of the pixels
        train.npy  val.npy  test.npy  (N, C, H, W) uint8
        train_labels.npy  ...         (N,) int64

Data sets larger than the memory train from there, each batch from its own pages of the files alone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress, TaskID

from evomoe.data.cache import build_folder
from evomoe.data.corpus import SPLITS
from evomoe.data.images.decoder import Decoder
from evomoe.data.images.source import ImageSet, PixelSummary, check_labels, map_images
from evomoe.errors import ConfigError

FORMAT = 1
"""Version of the files and of the decoding, part of the fingerprint."""

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
        ConfigError: A split cannot be learnt, an image cannot be read or has another size than the first, there is too
            little space, or `cache_dir` cannot be written.
    """
    check_labels(splits, classes)

    def write(draft: Path, progress: Progress) -> None:
        total = sum(len(split.labels) for split in splits.values())
        shape = decoder.decode(*splits["train"].read(0)).shape
        _check_space(draft, total * int(np.prod(shape)))
        task = progress.add_task("decoding", total=total)
        for name, split in splits.items():
            np.save(draft / f"{name}_labels.npy", split.labels)
            _decode(split, draft / f"{name}.npy", shape, decoder, progress, task)
        progress.update(task, description="counting pixels", total=None)
        summary = ImageSet(_splits(draft), classes).summary
        meta = {"classes": classes, "digest": summary.digest, "counts": summary.counts.tolist()}
        (draft / "meta.json").write_text(json.dumps(meta), encoding="utf-8")

    return build_folder(cache_dir, {"image_format": FORMAT, "classes": classes, **identity}, write)


def open_store(directory: Path) -> ImageSet:
    """Return the images of a folder that `build_store` made.

    Raises:
        ConfigError: A file is missing or damaged.
    """
    try:
        meta = json.loads((directory / "meta.json").read_text(encoding="utf-8"))
        summary = PixelSummary(meta["digest"], np.array(meta["counts"], dtype=np.int64))
        splits = _splits(directory)
        for name, split in splits.items():
            if len(split.images) != len(split.labels):
                raise ValueError(f"{name}.npy has {len(split.images)} images for {len(split.labels)} labels")
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        reason = f"meta.json lacks {error}" if isinstance(error, KeyError) else error
        raise ConfigError(f"the data cache {directory} is damaged ({reason}); delete the folder to rebuild") from error
    return ImageSet(splits, meta["classes"], summary)


def _splits(directory: Path) -> dict[str, Any]:
    return {name: map_images(directory / f"{name}.npy", np.load(directory / f"{name}_labels.npy")) for name in SPLITS}


def _decode(
    split: EncodedImages, path: Path, shape: tuple[int, ...], decoder: Decoder, progress: Progress, task: TaskID
) -> None:
    """Write an `.npy` file, a few images at a time; Pillow decodes outside of Python's lock."""
    count = len(split.labels)
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    with path.open("wb") as file, ThreadPoolExecutor() as threads:
        np.lib.format.write_array_header_1_0(file, header)
        for start in range(0, count, _IMAGES_AT_ONCE):
            numbers = range(start, min(start + _IMAGES_AT_ONCE, count))
            for pixels in threads.map(lambda number: decoder.decode(*split.read(number)), numbers):
                file.write(pixels.tobytes())
                progress.advance(task)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConfigError(
            f"the decoded images need {needed / 1e9:.1f} GB in paths.cache_dir={folder.parent}, where {free / 1e9:.1f} "
            "GB are free: choose another folder, or a smaller data.image_size"
        )
