"""Random changes of training images, each a pure function of seed, epoch and image.

Shapes: C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from evomoe.errors import ConfigError

POLICIES = {"rand_augment": "RandAugment", "trivial_augment": "TrivialAugmentWide", "augmix": "AugMix"}
"""Policies of torchvision by name."""


@dataclass(frozen=True)
class Augmentation:
    """Cut-out, crop, flip, and a policy of torchvision, in this order.

    What is drawn depends on the arguments of the call alone, neither on a global generator nor on the process that
    reads the image: a resumed run sees the same images as one that was never stopped, with workers or without.

    Args:
        crop: Pixels of padding on each side, out of which a part of the image's own size is cut; 0 for none.
        crop_fill: Value of the padding, 0 to 255.
        flip: Whether to mirror every second image from left to right.
        policy: `rand_augment` (arXiv 1909.13719), `trivial_augment` (arXiv 2103.10158) or `augmix` (arXiv 1912.02781),
            as torchvision has them; None for none.
        area: Smallest share of the image that is cut out and scaled to the image's size, as Inception was trained
            (arXiv 1409.4842), but out of the square that the image already is; None for none. The part's width by
            height is from 3/4 to 4/3; where such a part is longer than the image, it ends there.

    Raises:
        ConfigError: An option is out of range, or torchvision is needed and not installed.
    """

    crop: int = 0
    crop_fill: int = 0
    flip: bool = False
    policy: str | None = None
    area: float | None = None

    def __post_init__(self) -> None:
        if self.area is not None and not 0 < self.area <= 1:
            raise ConfigError(f"data.augmentation.area={self.area}: expected a share above 0, up to 1, or null")
        if self.crop < 0:
            raise ConfigError(f"data.augmentation.crop={self.crop}: expected 0 or more pixels of padding")
        if not 0 <= self.crop_fill <= 255:
            raise ConfigError(f"data.augmentation.crop_fill={self.crop_fill}: expected a value of a pixel, 0 to 255")
        if self.policy is not None and self.policy not in POLICIES:
            raise ConfigError(
                f"data.augmentation.policy={self.policy} is unknown: expected one of {', '.join(POLICIES)}, or null"
            )
        if self.policy is not None:
            self._load_policy()

    def identity(self) -> dict[str, Any]:
        """Return the options by the names that a user knows."""
        return {f"data.augmentation.{field.name}": getattr(self, field.name) for field in fields(self)}

    def __call__(self, image: np.ndarray, *key: int) -> np.ndarray:
        """Change an image.

        Args:
            image: `(C, H, W)` uint8.
            key: What the draws follow from: seed, epoch and number of the image.

        Returns:
            `(C, H, W)` uint8.
        """
        # A hash of the key serves as the random numbers: to seed a generator costs more than the changes themselves.
        shift, mirror, seed = struct.unpack("3Q", _hash(*key, size=24))
        if self.area is not None:
            # A draw of its own: without it all others are as they were.
            image = cut_out(image, self.area, *struct.unpack("4Q", _hash("area", *key, size=32)))
        if self.crop:
            places = 2 * self.crop + 1
            image = crop_at(image, self.crop, shift % places, shift // places % places, self.crop_fill)
        if self.flip and mirror % 2:
            image = image[:, :, ::-1]
        if self.policy is not None:
            with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator alone
                torch.default_generator.manual_seed(seed)
                image = self._load_policy()(torch.from_numpy(np.array(image, order="C"))).numpy()
        return image

    def _load_policy(self) -> Any:
        try:
            from torchvision.transforms import v2
        except (ImportError, RuntimeError) as error:  # the latter from a build for another torch
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"data.augmentation.policy={self.policy} needs the package torchvision, which cannot be imported here "
                f'({reason}); run pip install -e ".[vision]", or set it to null'
            ) from error
        return getattr(v2, POLICIES[str(self.policy)])()


def cut_out(image: np.ndarray, area: float, share: int, aspect: int, top: int, left: int) -> np.ndarray:
    """Cut a part out of an image, and scale it to the image's size.

    Args:
        image: `(C, H, W)` uint8.
        area: Smallest share of it.
        share: The part's share is uniform from `area` to 1 in this number of 64 bits.
        aspect: The logarithm of width by height is uniform from that of 3/4 to that of 4/3 in this one.
        top: So is its upper edge among the places that there are.
        left: So is its left edge.

    Returns:
        `(C, H, W)` uint8.
    """
    _, height, width = image.shape
    pixels = (area + (1 - area) * share / 2**64) * height * width
    ratio = math.exp((2 * aspect / 2**64 - 1) * math.log(4 / 3))
    rows = min(height, max(1, round(math.sqrt(pixels / ratio))))
    columns = min(width, max(1, round(math.sqrt(pixels * ratio))))
    top, left = top % (height - rows + 1), left % (width - columns + 1)
    part = torch.from_numpy(image[None, :, top : top + rows, left : left + columns].astype(np.float32))
    scaled = functional.interpolate(part, (height, width), mode="bilinear", align_corners=False)
    return scaled[0].round().clamp(0, 255).to(torch.uint8).numpy()


def crop_at(image: np.ndarray, padding: int, top: int, left: int, fill: int) -> np.ndarray:
    """Pad an image `(C, H, W)` with `fill` on all sides, and cut its own size out at `top` and `left`."""
    channels, height, width = image.shape
    padded = np.full((channels, height + 2 * padding, width + 2 * padding), fill, image.dtype)
    padded[:, padding : padding + height, padding : padding + width] = image
    return padded[:, top : top + height, left : left + width]


def _hash(*key: Any, size: int) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=size).digest()
