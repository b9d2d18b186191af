"""Pictures of which patch of an image goes to which expert, drawn without any graphics package.

Shapes: B images, C channels, H height, W width, rows x columns = N patches, S tokens (N, or N + 1 with a class token),
E experts. Pictures are ``(height, width, 3)`` uint8.
"""

from __future__ import annotations

import colorsys
import struct
import zlib
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor

from evomoe.callbacks.tensorboard import find_tensorboard
from evomoe.errors import ConfigError
from evomoe.routing import Routing, SoftRouting

SMALLEST_SIDE = 128
"""Pixels of the shorter side of a drawn image, which is enlarged by a whole number."""

GAP = 4
"""White pixels between two images of a picture."""

TINT = 0.6
"""Share of an expert's colour in what is drawn over an image."""

TINY = torch.finfo(torch.float32).tiny
"""The smallest weight that is drawn as one; an image that is padding has none."""


class PatchPictures(L.Callback):
    """Draws after each validation of a fit how the final rule routed its first images.

    For each MoE layer one picture with a row for each image, in the folder ``pictures`` of the run and among
    TensorBoard's images. Of a sparse routing the columns are: the image; its patches in the colour of the expert with
    the largest weight, grey where none works; and how many experts work for each patch, from black (none) to white (the
    most of this picture). Below stand the colours of the experts in order, from 0. Of a soft routing the columns after
    the image are the first slots of different experts: how much of each patch goes into the slot, white for the most.

    Args:
        images: how many, the first ones of the validation.
        slots: of a soft routing, how many.

    Raises:
        ConfigError: an argument is below 1.
    """

    def __init__(self, images: int = 8, slots: int = 6) -> None:
        for name, number in (("images", images), ("slots", slots)):
            if number < 1:
                raise ConfigError(f"callbacks.pictures.{name}={number}: expected at least 1")
        self.images = images
        self.slots = slots
        self._pictures: dict[str, np.ndarray] = {}

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the first batch."""
        fitting = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if batch_idx > 0 or not fitting or not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        model: Any = pl_module.model
        mean, std = (np.asarray(moments)[:, None, None] for moments in (data.mean, data.std))
        images = [show(image * std + mean) for image in batch["images"][: self.images].cpu().numpy()]
        for (name, layer), routing in zip(model.moe_layers.items(), outputs["final_routings"], strict=True):
            if layer.live_experts > 1:
                weights = patch_weights(routing, len(batch["images"]), model.num_patches)[: self.images]
                self._pictures[name] = draw(images, weights, self.slots if isinstance(routing, SoftRouting) else None)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the pictures."""
        folder, tensorboard = Path(trainer.default_root_dir) / "pictures", find_tensorboard(trainer)
        for name, picture in self._pictures.items():
            content = encode_png(picture)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}_step_{trainer.global_step:08}.png").write_bytes(content)
            if tensorboard is not None:
                height, width, _ = picture.shape
                image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
                summary = Summary(value=[Summary.Value(tag=f"val_moe/{name}/patches", image=image)])
                # Not add_image, which wants Pillow to encode it.
                tensorboard.experiment._get_file_writer().add_summary(summary, trainer.global_step)
        self._pictures = {}


def patch_weights(routing: Routing, images: int, num_patches: int) -> np.ndarray:
    """What of each patch goes where, ``(B, N, E)``; a class token is left out.

    Args:
        routing: of B images.
        images: B.
        num_patches: N.

    Returns:
        Combine weights of the experts, 0 where one does not work; of a soft routing the dispatch weights of the first
        slot of each expert.
    """
    if isinstance(routing, SoftRouting):
        dense = routing.dispatch[..., 0].flatten(0, 1)  # (T, E)
    else:
        dense = routing.to_dense()
        chosen = torch.zeros_like(dense, dtype=torch.bool)
        chosen[routing.token, routing.expert] = True
        dense = dense.abs().clamp(min=TINY) * chosen  # a weight of 0 is work too
    per_image: Tensor = dense.float().unflatten(0, (images, -1))[:, -num_patches:]
    return per_image.cpu().numpy()


def draw(images: list[np.ndarray], weights: np.ndarray, slots: int | None) -> np.ndarray:
    """One picture of images and how their patches were routed.

    Args:
        images: enlarged ones.
        weights: ``(B, N, E)``.
        slots: of how many experts the weights are drawn one by one; None for a sparse routing.
    """
    experts = weights.shape[2]
    if slots is not None:
        shown = weights[:, :, :slots]
        rows = [
            [image, *(heat(image, slot / max(slot.max(), TINY)) for slot in of_image.T)]
            for image, of_image in zip(images, shown, strict=True)
        ]
        return stack(rows)
    colours = palette(experts)
    most = max(int((weights > 0).sum(axis=2).max()), 1)
    rows = [
        [image, tint(image, of_image, colours), heat(image, (of_image > 0).sum(axis=1) / most)]
        for image, of_image in zip(images, weights, strict=True)
    ]
    picture = stack(rows)
    width = picture.shape[1]
    legend = colours[np.minimum(np.arange(width) * experts // width, experts - 1)]
    return np.concatenate([picture, np.broadcast_to(legend, (4 * GAP, width, 3))]).astype(np.uint8)


def show(image: np.ndarray) -> np.ndarray:
    """``(C, H, W)`` from 0 to 1 as an enlarged picture."""
    pixels = (image.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    pixels = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, :3]
    return enlarge(pixels, -(-SMALLEST_SIDE // min(pixels.shape[:2])))


def tint(image: np.ndarray, weights: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Each patch in the colour of its heaviest expert; ``weights`` is ``(N, E)``."""
    grey = image.mean(axis=2, keepdims=True).repeat(3, axis=2)
    over = spread(colours[weights.argmax(axis=1)], image)
    working = spread(weights.max(axis=1, keepdims=True), image) > 0
    return np.where(working, (1 - TINT) * grey + TINT * over, grey).astype(np.uint8)


def heat(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values ``(N,)`` from 0 to 1 in place of the patches, through red and yellow from black to white."""
    colours = np.stack([(values * 3 - channel).clip(0, 1) for channel in range(3)], axis=1) * 255
    return spread(colours.astype(np.uint8), image)


def spread(values: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Values ``(N, channels)`` of the patches as pixels ``(height, width, channels)`` of an image."""
    side = round(len(values) ** 0.5)
    return enlarge(values.reshape(side, side, -1), image.shape[0] // side)


def enlarge(pixels: np.ndarray, times: int) -> np.ndarray:
    """Make each pixel a square."""
    return pixels.repeat(times, axis=0).repeat(times, axis=1)


def stack(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Pictures of one size as a table, with white lines around them."""
    framed = [[np.pad(cell, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for cell in row] for row in rows]
    return np.concatenate([np.concatenate(row, axis=1) for row in framed])


def palette(number: int) -> np.ndarray:
    """As many colours around the wheel, ``(number, 3)`` uint8; neighbours also differ in brightness."""
    wheel = [colorsys.hsv_to_rgb(index / number, 0.9, (1.0, 0.7)[index % 2]) for index in range(number)]
    return (np.array(wheel) * 255).round().astype(np.uint8)


def encode_png(picture: np.ndarray) -> bytes:
    """A picture as a PNG file (ISO/IEC 15948)."""
    height, width, _ = picture.shape
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # each begins with its filter, none
    lines[:, 1:] = picture.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits, three colours
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)
