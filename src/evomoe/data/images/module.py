"""Lightning datamodules for image classification: one base class, one subclass per source of images.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset

from evomoe.data.datamodule import IdentifiedDataModule
from evomoe.data.images.arrays import Cifar, Digits, IdxFiles
from evomoe.data.images.augmentation import Augmentation
from evomoe.data.images.files import HubImages, ImageFolder
from evomoe.data.images.source import ImageSet, ImageSource, LabelledImages, check_square
from evomoe.data.sampling import (
    Batch,
    ResumableDataLoader,
    TrainingSampler,
    evaluation_loader,
    rank_and_world_size,
    training_loader,
)
from evomoe.errors import ConfigError

NO_AUGMENTATION = Augmentation()


class ImageDataset(Dataset[dict[str, Any]]):
    """Images of a split as `{"images": (C, H, W) float32, "labels": int, "valid": bool}`.

    The items of training are asked for by epoch and number, as the augmentation of an image depends on both. Images
    beyond the last are grey and not valid: ranks that would have one less than others score those.

    Args:
        split: The images.
        mean: Of the channels in the training split, `(C,)`, on the scale from 0 to 1.
        std: The same of their standard deviation.
        augmentation: What changes the images; none in evaluation.
        seed: Of the augmentation.
    """

    def __init__(
        self,
        split: LabelledImages,
        mean: np.ndarray,
        std: np.ndarray,
        augmentation: Augmentation = NO_AUGMENTATION,
        seed: int = 0,
    ) -> None:
        self._split = split
        self._scale = (1 / (255 * std)).astype(np.float32)[:, None, None]
        self._shift = (mean / std).astype(np.float32)[:, None, None]
        self._augmentation = augmentation
        self._seed = seed

    def __len__(self) -> int:
        return len(self._split)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = item if isinstance(item, tuple) else (0, item)
        if index >= len(self):
            return {"images": np.zeros(self._split.images.shape[1:], np.float32), "labels": 0, "valid": False}
        image = self._augmentation(self._split.images[index], self._seed, epoch, index)
        label = int(self._split.labels[index])
        return {"images": image * self._scale - self._shift, "labels": label, "valid": True}


class ImageSampler(TrainingSampler):
    """The training order of pairs of epoch and number of an image; see `TrainingSampler`."""

    def order(self, epoch: int) -> list[tuple[int, int]]:
        """Return what this process takes in an epoch, a pure function of its arguments."""
        return [(epoch, index) for index in super().order(epoch)]


class ImageDataModule(IdentifiedDataModule):
    """Batches `{"images": (B, C, H, W) float32, "labels": (B,) int64, "valid": (B,) bool}`, for classification.

    The images lie as bytes in memory, or in a mapped file where they had to be decoded. Each channel is normalised to
    mean 0 and standard deviation 1 over the training split. An image that is not valid is padding, of which a run of
    several processes may have one each in its last evaluation batch.

    Args:
        source: The images.
        batch_size: B, images per training batch and process.
        eval_batch_size: Images per evaluation batch and process; None for `batch_size`.
        augmentation: What changes the training images.
        num_workers: Processes that read batches ahead; 0 reads in the training process.
        seed: Seed of the training order and of the augmentation.

    Raises:
        ConfigError: A size is not positive.
    """

    holds = "images"
    trained_on = "the training images"

    def __init__(
        self,
        source: ImageSource,
        *,
        batch_size: int,
        eval_batch_size: int | None = None,
        augmentation: Augmentation = NO_AUGMENTATION,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__({"batch_size": batch_size, "eval_batch_size": eval_batch_size}, num_workers, seed)
        self.source = source
        self.batch_size = batch_size
        self.eval_batch_size = batch_size if eval_batch_size is None else eval_batch_size
        self.augmentation = augmentation
        self._images: ImageSet | None = None

    def prepare_data(self) -> None:
        """Download and decode what is missing."""
        self.source.prepare()

    def setup(self, stage: str | None = None) -> None:  # noqa: ARG002
        """Read all splits, whatever the stage.

        Raises:
            ConfigError: The images are not square, or all of their channels are constant.
        """
        if self._images is not None:
            return
        images = self.source.load()
        check_square(images.shape, "cut or pad them")
        self._images = images
        if (np.count_nonzero(images.summary.counts, axis=1) == 1).all():
            raise ConfigError("every channel of the training images is constant: there is nothing to learn from them")

    @property
    def images(self) -> ImageSet:
        """The splits."""
        if self._images is None:
            raise RuntimeError("call prepare_data() and setup() first")
        return self._images

    @property
    def classes(self) -> list[str]:
        """Name of each class."""
        return self.images.classes

    @property
    def mean(self) -> np.ndarray:
        """Mean of each channel over the training split, `(C,)`, on the scale from 0 to 1."""
        return self._moments[0]

    @property
    def std(self) -> np.ndarray:
        """Deviation of each channel over the training split, `(C,)`, on the scale from 0 to 1; 1 for a constant one."""
        return self._moments[1]

    @cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Exact, from the counts of the 256 values of a pixel."""
        values = np.arange(256) / 255
        counts = self.images.summary.counts
        shares = counts / counts.sum(axis=1, keepdims=True)
        mean = shares @ values
        variance = (shares * (values - mean[:, None]) ** 2).sum(axis=1)
        return mean, np.where(np.count_nonzero(counts, axis=1) > 1, np.sqrt(variance), 1.0)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Plain values that tell these images from others."""
        counts = {split: len(images) for split, images in self.images.splits.items()}
        return {**self.source.identity(), **counts, "classes": len(self.classes), "content": self.images.summary.digest}

    def meaning(self) -> dict[str, Any]:
        """Return the names of the classes, and mean and deviation of the channels, by which they are normalised."""
        return {"classes": self.classes, "mean": self.mean.tolist(), "std": self.std.tolist()}

    def adapt_to(self, state_dict: Mapping[str, Any], split: str) -> str:  # noqa: ARG002
        """Read the images, as what they are decides about their scale.

        Args:
            state_dict: What `state_dict` returned for the checkpoint.
            split: What will be measured. One held out of other training images needs no refusal of its own, as those
                have another mean.

        Returns:
            In what the images differ from those of the checkpoint; empty if in nothing.
        """
        self.prepare_data()
        self.setup()
        return self.changes_since(state_dict)

    def model_sizes(self) -> dict[str, int]:
        """Return the arguments of a model that the data decide."""
        channels, size, _ = self.images.shape
        return {"num_classes": len(self.classes), "channels": channels, "image_size": size}

    def describe(self) -> str:
        """Return one line for the log: what the images are, and how many."""
        counts = ", ".join(f"{split} {len(images):,}" for split, images in self.images.splits.items())
        channels, height, width = self.images.shape
        return (
            f"{self.source.identity()['images']}: {counts} images of {channels} x {height} x {width} in "
            f"{len(self.classes)} classes ({self.fingerprint})"
        )

    def _difference(self, name: str, there: Any, here: Any) -> str | None:
        if name not in ("mean", "std"):
            return super()._difference(name, there, here)
        if np.allclose(there, here):
            return None
        return (
            f"the checkpoint was trained on images of another {name} of the channels ({there}) than these ({here}), by "
            f"which they are normalised; restore {self.trained_on}"
        )

    def dataset(self, split: str) -> ImageDataset:
        """Return the images of a split as they are evaluated: normalised, not augmented."""
        return ImageDataset(self.images.splits[split], self.mean, self.std)

    def train_dataloader(self) -> ResumableDataLoader:
        """Return the shuffled training batches, whose position Lightning saves and restores."""
        images = ImageDataset(self.images.splits["train"], self.mean, self.std, self.augmentation, self.seed)
        identity = {
            "data fingerprint": self.fingerprint,
            "data.batch_size": self.batch_size,
            **self.augmentation.identity(),
        }
        rank, world_size = rank_and_world_size()
        sampler = ImageSampler(images, "images", identity, self.batch_size, self.seed, rank, world_size)
        return training_loader(images, sampler, self.batch_size, self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the validation images, in an order drawn once for all."""
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the test images, in an order drawn once for all."""
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Batch]:
        rank, world_size = rank_and_world_size()
        return evaluation_loader(self.dataset(split), self.eval_batch_size, self.num_workers, rank, world_size)


class DigitImages(ImageDataModule):
    """Handwritten digits of 8 x 8 pixels, from scikit-learn. No download.

    Args:
        holdout: Share of each class that is held out for validation; twice as much is for the test.
        options: Those of `ImageDataModule`.
    """

    def __init__(self, holdout: float = 0.1, **options: Any) -> None:
        super().__init__(Digits(holdout), **options)


class IdxImages(ImageDataModule):
    """MNIST, Fashion-MNIST and their like.

    Args:
        path: Folder of the four files, packed by gzip or not.
        holdout: Share of the training images of each class that is held out for validation.
        options: Those of `ImageDataModule`.
    """

    def __init__(self, path: str, holdout: float = 0.1, **options: Any) -> None:
        super().__init__(IdxFiles(path, holdout), **options)


class CifarImages(ImageDataModule):
    """CIFAR-10 and CIFAR-100 in their binary versions, or any images in an `.npz` file.

    Args:
        path: Folder of the `.bin` files, or an `.npz` file; see `Cifar`.
        holdout: Share of the training images of each class that is held out for validation.
        options: Those of `ImageDataModule`.
    """

    def __init__(self, path: str, holdout: float = 0.1, **options: Any) -> None:
        super().__init__(Cifar(path, holdout), **options)


class FolderImages(ImageDataModule):
    """The user's own image files: a folder for each split, in it one for each class.

    Args:
        path: Folder of `train`, `test`, and perhaps `val`.
        image_size: Height and width to which the images are brought; None if all have one size.
        channels: 3 for colours, 1 for grey.
        holdout: Share of each class that is held out of `train` where there is no `val`.
        cache_dir: Folder of the decoded images; None for the default one.
        options: Those of `ImageDataModule`.
    """

    def __init__(
        self,
        path: str,
        image_size: int | None = None,
        channels: int = 3,
        holdout: float = 0.1,
        *,
        cache_dir: str | Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(ImageFolder(path, cache_dir, image_size, channels, holdout), **options)


class HubImageData(ImageDataModule):
    """A public data set by name, through Hugging Face `datasets`.

    Args:
        name: Name on the Hub, or path of a local folder.
        config: Configuration of the data set.
        train: Name of its training split.
        val: Name of its validation split; None holds it out of `train`.
        test: Name of its test split.
        image_field: Column of the images.
        label_field: Column of the labels.
        image_size: Height and width to which the images are brought; None if all have one size.
        channels: 3 for colours, 1 for grey.
        holdout: Share of each class that is held out of `train` where `val` is None.
        cache_dir: Folder of the decoded images; None for the default one.
        options: Those of `ImageDataModule`.
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
        *,
        cache_dir: str | Path | None = None,
        **options: Any,
    ) -> None:
        source = HubImages(
            name, cache_dir, config, train, val, test, image_field, label_field, image_size, channels, holdout
        )
        super().__init__(source, **options)
