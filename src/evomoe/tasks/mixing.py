"""Two images in one, with the labels of both.

Shapes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Beta


class Mixed(NamedTuple):
    """A batch of mixed images.

    Args:
        images: ``(B, C, H, W)``.
        labels: of the first image in each, ``(B,)``.
        other_labels: of the second, ``(B,)``.
        share: of the first in the pixels of all of them.
    """

    images: Tensor
    labels: Tensor
    other_labels: Tensor
    share: float


def mix_up(images: Tensor, labels: Tensor, alpha: float) -> Mixed:
    """Blend each image with another one (mixup, arXiv 1710.09412), all by the same share.

    The share is drawn from Beta(alpha, alpha); all draws come from the global generator.

    Args:
        images: ``(B, C, H, W)``.
        labels: ``(B,)``.
        alpha: above 0; 1 draws all shares equally often, less prefers those near 0 and 1.
    """
    share, other = _draw(alpha, len(labels))
    return Mixed(share * images + (1 - share) * images[other], labels, labels[other], share)


def cut_mix(images: Tensor, labels: Tensor, alpha: float) -> Mixed:
    """Paste a box of another image into each (CutMix, arXiv 1905.04899), for all at the same place.

    The share of the box is drawn from Beta(alpha, alpha), its centre anywhere; what lies outside of the image is cut
    off, and the labels count by the pixels that remain.

    Args:
        images: ``(B, C, H, W)``.
        labels: ``(B,)``.
        alpha: as of :func:`mix_up`.
    """
    share, other = _draw(alpha, len(labels))
    height, width = images.shape[2:]
    rows, columns = (_span(size, math.sqrt(1 - share)) for size in (height, width))
    mixed = images.clone()
    mixed[:, :, rows, columns] = images[other][:, :, rows, columns]
    box = (rows.stop - rows.start) * (columns.stop - columns.start)
    return Mixed(mixed, labels, labels[other], 1 - box / (height * width))


def _draw(alpha: float, batch: int) -> tuple[float, list[int]]:
    """The share of the first image, and the number of the second for each of the batch."""
    alphas = torch.tensor([alpha, alpha], dtype=torch.float32)  # under bf16-true the default has no Beta
    return float(Beta(*alphas).sample()), torch.randperm(batch).tolist()


def _span(size: int, share: float) -> slice:
    """A stretch of about ``share`` of ``size`` around a random place."""
    centre, half = int(torch.randint(size, ())), size * share / 2
    return slice(max(round(centre - half), 0), min(round(centre + half), size))
