"""Where callbacks find TensorBoard, and what they show there beside numbers."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor


def find_tensorboard(trainer: L.Trainer) -> TensorBoardLogger | None:
    """The run's logger to TensorBoard, wherever it stands among its loggers; None if it has none."""
    return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)


def write_bars(writer: Any, key: str, values: Tensor, step: int) -> None:
    """Write ``values (N,)``, not negative, as a histogram whose bucket i, around the number i, holds the i-th of them.

    ``SummaryWriter.add_histogram`` would take them for samples, and show how often each value occurs.
    """
    counts = values.cpu().double()  # in this order: Apple GPUs have no double precision
    numbers = torch.arange(counts.numel(), dtype=torch.double)
    writer.add_histogram_raw(
        key,
        min=-0.5,
        max=counts.numel() - 0.5,
        num=float(counts.sum()),
        sum=float((counts * numbers).sum()),
        sum_squares=float((counts * numbers.square()).sum()),
        bucket_limits=(numbers + 0.5).tolist(),
        bucket_counts=counts.tolist(),
        global_step=step,
    )
