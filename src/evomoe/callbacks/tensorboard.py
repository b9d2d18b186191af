"""Where callbacks find TensorBoard, which shows what is no number."""

from __future__ import annotations

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger


def find_tensorboard(trainer: L.Trainer) -> TensorBoardLogger | None:
    """The run's logger to TensorBoard, wherever it stands among its loggers; None if it has none."""
    return next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
