"""Pictures of which patch of an image goes to which expert, drawn without any graphics package.

Shapes: B images, H height, W width, rows x columns = N patches, T tokens of all images (of each N, or N + 1 with a
class token), E experts, C channels or slots per expert. Pictures are ``(height, width, 3)`` uint8.
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
from evomoe.routing import SoftRouting, SparseRouting

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

    For each MoE layer one picture, in the folder ``pictures`` of the run and among TensorBoard's images. Of a sparse
    routing an image has one row: the image; its patches in the colour of the expert with the largest weight, grey where
    none works; and how many experts work for each patch, from black (none) to white (the most of this picture).

    Of a soft routing it has two. The first: the image, and of different slots how much of each patch goes into them,
    white for the most; these are the first slots of the experts in order, then the second ones, and so on. The second:
    the patches in the colour of the expert from whose slots they receive most, and how much each receives from the slot
    above.

    Below stand the colours of the experts in order, from 0.

    Args:
        images: how many, the first ones of the first batch.
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
        if batch_idx == 0 and fitting and trainer.is_global_zero:
            self._pictures = self.draw_layers(trainer, pl_module, outputs, batch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the pictures."""
        folder, tensorboard = Path(trainer.default_root_dir) / "pictures", find_tensorboard(trainer)
        for name, picture in self._pictures.items():
            content = write_png(folder / f"{name}_step_{trainer.global_step:08}.png", picture)
            if tensorboard is not None:
                height, width, _ = picture.shape
                image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
                summary = Summary(value=[Summary.Value(tag=f"val_moe/{name}/patches", image=image)])
                # Not add_image, which wants Pillow to encode it.
                tensorboard.experiment._get_file_writer().add_summary(summary, trainer.global_step)
        self._pictures = {}

    def draw_layers(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any
    ) -> dict[str, np.ndarray]:
        """A picture of each MoE layer that routes, by its name; for the arguments see Lightning's hooks of a batch."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        model: Any = pl_module.model
        mean, std = (np.asarray(moments)[:, None, None] for moments in (data.mean, data.std))
        normalised = batch["images"][: self.images].float().cpu().numpy()
        images = [show(image * std + mean) for image in normalised]
        batch_size, pictures = len(batch["images"]), {}
        for (name, layer), routing in zip(model.moe_layers.items(), outputs["final_routings"], strict=True):
            if not layer.routes:
                continue
            if isinstance(routing, SoftRouting):
                dispatch, combine = (
                    slot_weights(weights, batch_size, model.num_patches)[: self.images]
                    for weights in (routing.dispatch, routing.combine)
                )
                pictures[name] = draw_soft(images, dispatch, combine, self.slots)
            else:
                weights = patch_weights(routing, batch_size, model.num_patches)[: self.images]
                pictures[name] = draw_sparse(images, weights)
        return pictures


class CheckpointPictures(PatchPictures):
    """Draws in the same way what the first images of a validation or test outside of a fit meet.

    Args:
        folder: where to write.
        name: end of the names of the files, behind the layer.
        images: how many, the first ones of the first batch.
        slots: of a soft routing, how many.
    """

    def __init__(self, folder: Path, name: str, images: int = 8, slots: int = 6) -> None:
        super().__init__(images, slots)
        self.folder = folder
        self.name = name

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
        if batch_idx == 0:
            self._pictures = self.draw_layers(trainer, pl_module, outputs, batch)

    on_test_batch_end = on_validation_batch_end

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the pictures."""
        for layer, picture in self._pictures.items():
            write_png(self.folder / f"{layer}_{self.name}.png", picture)

    on_test_end = on_validation_end


def patch_weights(routing: SparseRouting, images: int, num_patches: int) -> np.ndarray:
    """Combine weights of the experts for each patch, ``(B, N, E)``, 0 where one does not work.

    Args:
        routing: of B images.
        images: B.
        num_patches: N; a class token is left out.
    """
    dense = routing.to_dense().float()
    chosen = torch.zeros_like(dense, dtype=torch.bool)
    chosen[routing.token, routing.expert] = True
    return _of_patches(dense.abs().clamp(min=TINY) * chosen, images, num_patches)  # a weight of 0 is work too


def slot_weights(weights: Tensor, images: int, num_patches: int) -> np.ndarray:
    """Dispatch or combine weights of each patch and slot, ``(B, N, C, E)``.

    Args:
        weights: ``(G, S, E, C)``, of B images in all.
        images: B.
        num_patches: N; a class token is left out.
    """
    return _of_patches(weights.float().flatten(0, 1).transpose(1, 2), images, num_patches)


def _of_patches(values: Tensor, images: int, num_patches: int) -> np.ndarray:
    """``(T, ...)`` to ``(B, N, ...)``."""
    return values.unflatten(0, (images, -1))[:, -num_patches:].cpu().numpy()


def draw_sparse(images: list[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """One picture of images and which experts work for their patches.

    Args:
        images: enlarged ones.
        weights: ``(B, N, E)``.
    """
    colours = palette(weights.shape[2])
    most = max(int((weights > 0).sum(axis=2).max()), 1)
    rows = [
        [image, tint(image, of_image, colours), heat(image, (of_image > 0).sum(axis=1) / most)]
        for image, of_image in zip(images, weights, strict=True)
    ]
    return with_legend(stack(rows), colours)


def draw_soft(images: list[np.ndarray], dispatch: np.ndarray, combine: np.ndarray, slots: int) -> np.ndarray:
    """One picture of images, what slots read of their patches, and what the patches receive of the slots.

    Args:
        images: enlarged ones.
        dispatch: ``(B, N, C, E)``.
        combine: of the same shape.
        slots: how many of the C * E slots are drawn, the first ones of all experts before the second ones.
    """
    colours = palette(dispatch.shape[3])
    rows = []
    for image, read, received in zip(images, dispatch, combine, strict=True):
        of_experts = tint(image, received.sum(axis=1), colours)
        for first, weights in ((image, read), (of_experts, received)):
            shown = weights.reshape(len(weights), -1)[:, :slots].T
            rows.append([first, *(heat(image, slot / max(slot.max(), TINY)) for slot in shown)])
    return with_legend(stack(rows), colours)


def with_legend(picture: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A picture above the colours of the experts in order."""
    width, experts = picture.shape[1], len(colours)
    legend = colours[np.minimum(np.arange(width) * experts // width, experts - 1)]
    return np.concatenate([picture, np.broadcast_to(legend, (4 * GAP, width, 3))]).astype(np.uint8)


def show(image: np.ndarray) -> np.ndarray:
    """``(C, H, W)`` from 0 to 1 as an enlarged picture: of the first three channels, or grey where there are fewer."""
    colours = image[:3] if len(image) >= 3 else image.mean(axis=0, keepdims=True).repeat(3, axis=0)
    pixels = (colours.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
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


def write_png(path: Path, picture: np.ndarray) -> bytes:
    """Write a picture, in a folder that need not be there yet; returns the content of the file."""
    content = encode_png(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return content


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
