"""Counts the matrix products of real training steps, beside what they are charged."""

from __future__ import annotations

import contextlib
from typing import Any

import lightning as L
from helpers.flops import flop_counter
from torch.nn.attention import SDPBackend, sdpa_kernel

from evomoe.callbacks.console.status import phase_of


class CountFlops(L.Callback):
    """Keeps ``(phase, charged, counted)`` of every batch: forward, backward, clipping and optimizer step."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, int]] = []
        self._stack = contextlib.ExitStack()
        self._counter: Any = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # The counter knows no fused attention on CPU, so attention runs as its two matrix products.
        self._stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        self._counter = self._stack.enter_context(flop_counter())

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stack.close()
        self.seen.append((phase_of(trainer), outputs["work"].training_flops, self._counter.get_total_flops()))
