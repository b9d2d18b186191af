"""What Lightning says that tells nothing about a run."""

from __future__ import annotations

import logging
import warnings

NOISE = ("GPU available", "TPU available", "\N{ELECTRIC LIGHT BULB} Tip", "`Trainer.fit` stopped", "`Trainer(limit_")
"""Beginnings of such messages."""


def hush() -> None:
    """Keep such messages and warnings from the console."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_news)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", module="lightning.*")


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(NOISE)
