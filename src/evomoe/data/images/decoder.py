"""Encoded images, and what Pillow makes of them."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from evomoe.data.hub import first_line
from evomoe.errors import ConfigError

BROKEN = (OSError, ValueError, SyntaxError, TypeError, AttributeError, LookupError, EOFError, struct.error)
"""What Pillow raises for files that are broken."""

ORIENTATION = 0x0112
"""Tag of EXIF."""


class Decoder:
    """Turns encoded images into arrays of one shape. Several threads may share it once it has decoded one.

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
        except (self._pillow.DecompressionBombError, *BROKEN) as error:
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

    def count(self, pixels: np.ndarray) -> list[list[int]]:
        """Return how many pixels of each channel have each value, `(C, 256)`; as `bincount`, in a tenth of its time."""
        return [self._pillow.fromarray(np.ascontiguousarray(plane)).histogram() for plane in pixels]

    def _upright(self, image: Any) -> Any:
        """Turn an image as its camera was held; Pillow's own function fails at any other entry that is untidy."""
        turns = self._pillow.Transpose
        turn = {
            2: turns.FLIP_LEFT_RIGHT,
            3: turns.ROTATE_180,
            4: turns.FLIP_TOP_BOTTOM,
            5: turns.TRANSPOSE,
            6: turns.ROTATE_270,
            7: turns.TRANSVERSE,
            8: turns.ROTATE_90,
        }.get(image.getexif().get(ORIENTATION))
        return image if turn is None else image.transpose(turn)

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
