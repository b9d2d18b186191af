"""Images that are stored as arrays: scikit-learn's digits, the IDX files of MNIST, and CIFAR."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from evomoe.data.images.source import ImageSet, ImageSource, LabelledImages, existing, hold_out, with_validation
from evomoe.errors import ConfigError

DIGITS_LARGEST = 16
"""Value of black ink in scikit-learn's digits."""

IDX_IMAGES, IDX_LABELS = 0x0803, 0x0801
"""First four bytes of an IDX file of bytes: the type (8 for uint8) and the number of dimensions."""

CIFAR_PIXELS = 3 * 32 * 32

UNREADABLE = (
    OSError,
    EOFError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What NumPy raises for a file that is no `.npz`, or a damaged one."""


class Digits(ImageSource):
    """The 1797 handwritten digits of 8 x 8 pixels that scikit-learn contains (UCI, test part of *Optical recognition of
    handwritten digits*). No download.

    Args:
        holdout: Share of the images of each class that is held out for validation, and as many again, twice, for the
            test.
    """

    def __init__(self, holdout: float = 0.1) -> None:
        self._holdout = holdout

    def identity(self) -> dict[str, Any]:
        """Return the options."""
        return {"images": "digits", "holdout": self._holdout}

    def load(self) -> ImageSet:
        """Take the digits from the installed package."""
        from sklearn.datasets import load_digits  # takes a second to import

        values, labels = load_digits(return_X_y=True)
        images = np.rint(values * (255 / DIGITS_LARGEST)).astype(np.uint8).reshape(-1, 1, 8, 8)
        whole = LabelledImages(images, labels.astype(np.int64))
        indices = hold_out(whole.labels, {"val": self._holdout, "test": 2 * self._holdout})
        return ImageSet({name: whole[indices[name]] for name in ("train", "val", "test")}, list("0123456789"))


class IdxFiles(ImageSource):
    """The four files of MNIST and of its successors (Fashion-MNIST, KMNIST), packed by gzip or not.

    Args:
        path: Folder of `train-images-idx3-ubyte`, `train-labels-idx1-ubyte` and the same of `t10k`, each perhaps with
            the ending `.gz`.
        holdout: Share of the training images of each class that is held out for validation.
    """

    def __init__(self, path: str | Path, holdout: float = 0.1) -> None:
        self._path = existing(path)
        self._holdout = holdout

    def identity(self) -> dict[str, Any]:
        """Return the options, without the place of the files."""
        return {"images": "idx", "holdout": self._holdout}

    def load(self) -> ImageSet:
        """Read the files."""
        train, test = self._read("train"), self._read("t10k")
        classes = [str(label) for label in range(1 + max(int(split.labels.max(initial=0)) for split in (train, test)))]
        return ImageSet(with_validation(train, test, self._holdout), classes)

    def _read(self, prefix: str) -> LabelledImages:
        image_file, images = read_idx(self._path / f"{prefix}-images-idx3-ubyte", IDX_IMAGES)
        label_file, labels = read_idx(self._path / f"{prefix}-labels-idx1-ubyte", IDX_LABELS)
        if len(images) != len(labels):
            raise ConfigError(
                f"{label_file} has {len(labels)} labels and {image_file} {len(images)} images: give files of one set"
            )
        return LabelledImages(images[:, None], labels.astype(np.int64))


def read_idx(path: Path, magic: int) -> tuple[Path, np.ndarray]:
    """Read an IDX file, or its gzip beside it.

    Args:
        path: Without the ending `.gz`.
        magic: What its first four bytes must be.

    Returns:
        The file that was read, and its array of uint8.

    Raises:
        ConfigError: There is no such file, it is of another kind, or it is not whole.
    """
    packed = path.with_name(path.name + ".gz")
    if not path.exists() and not packed.exists():
        raise ConfigError(f"there is no file {path} or {packed.name}: expected data.path to be a folder that has it")
    path = path if path.exists() else packed
    try:
        content = gzip.decompress(path.read_bytes()) if path == packed else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} cannot be read ({error}): get the file again") from None
    dimensions = magic % 256
    if int.from_bytes(content[:4], "big") != magic:
        raise ConfigError(
            f"{path} is no IDX file of {dimensions}-dimensional bytes: expected it to begin with {magic:#010x}"
        )
    shape = np.frombuffer(content, ">u4", count=dimensions, offset=4) if len(content) >= 4 + 4 * dimensions else [1]
    body = content[4 + 4 * dimensions :]
    if len(body) != int(np.prod(shape)):
        raise ConfigError(f"{path} has {len(body)} bytes of data and states {int(np.prod(shape))}: get the file again")
    return path, np.frombuffer(body, np.uint8).reshape([int(size) for size in shape])


class Cifar(ImageSource):
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009) in its binary version, or any images in one `.npz` file.

    Args:
        path: Folder of `data_batch_1.bin` to `data_batch_5.bin` and `test_batch.bin` (CIFAR-10), or of `train.bin` and
            `test.bin` (CIFAR-100, whose fine labels are taken); or a file with the arrays `x_train`, `x_test`
            `(N, H, W, C)` or `(N, H, W)` uint8 and `y_train`, `y_test` `(N,)`.
        holdout: Share of the training images of each class that is held out for validation.
    """

    def __init__(self, path: str | Path, holdout: float = 0.1) -> None:
        self._path = existing(path)
        self._holdout = holdout

    def identity(self) -> dict[str, Any]:
        """Return the options, without the place of the files."""
        return {"images": "cifar", "holdout": self._holdout}

    def load(self) -> ImageSet:
        """Read the files."""
        if self._path.suffix == ".npz":
            train, test = self._read_npz("train"), self._read_npz("test")
        elif (self._path / "train.bin").exists():
            train, test = (self._read_binary([f"{split}.bin"], label_bytes=2) for split in ("train", "test"))
        else:
            train = self._read_binary([f"data_batch_{number}.bin" for number in range(1, 6)], label_bytes=1)
            test = self._read_binary(["test_batch.bin"], label_bytes=1)
        classes = [str(label) for label in range(1 + max(int(split.labels.max(initial=0)) for split in (train, test)))]
        return ImageSet(with_validation(train, test, self._holdout), classes)

    def _read_binary(self, names: list[str], label_bytes: int) -> LabelledImages:
        parts = []
        for name in names:
            path = self._path / name
            try:
                content = np.fromfile(path, np.uint8)
            except OSError as error:
                raise ConfigError(
                    f"{path} cannot be read ({error.strerror}): expected data.path to be the folder of CIFAR's binary "
                    "version, or an .npz file"
                ) from None
            record = label_bytes + CIFAR_PIXELS
            if len(content) == 0 or len(content) % record:
                raise ConfigError(
                    f"{path} has {len(content)} bytes, no multiple of the {record} of an image with its label: get the "
                    "file again"
                )
            parts.append(content.reshape(-1, record))
        rows = np.concatenate(parts)
        labels = rows[:, label_bytes - 1].astype(np.int64)  # the fine label is the second one
        return LabelledImages(np.ascontiguousarray(rows[:, label_bytes:]).reshape(-1, 3, 32, 32), labels)

    def _read_npz(self, split: str) -> LabelledImages:
        try:
            with np.load(self._path, allow_pickle=False) as arrays:
                images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"].reshape(-1)
        except UNREADABLE as error:
            reason = str(error).strip("'").partition("\n")[0]
            raise ConfigError(
                f"{self._path} cannot be read ({reason}): expected the arrays x_train, y_train, x_test and y_test"
            ) from None
        if images.dtype != np.uint8 or images.ndim not in (3, 4) or labels.dtype.kind not in "iu":
            raise ConfigError(
                f"{self._path} has x_{split} of {images.dtype} {images.shape} and y_{split} of {labels.dtype}: "
                "expected uint8 (N, H, W, C) or (N, H, W), and integers (N,)"
            )
        if len(images) != len(labels):
            raise ConfigError(
                f"{self._path} has {len(labels)} labels y_{split} and {len(images)} images x_{split}: give as many"
            )
        images = images[..., None] if images.ndim == 3 else images
        return LabelledImages(np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels.astype(np.int64))
