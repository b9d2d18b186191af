"""Logs speed and the training FLOPs spent so far."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
from torch import Tensor

from evomoe.models.flops import Work


class Throughput(L.Callback):
    """Logs ``throughput/tokens_per_second`` and ``throughput/training_flops`` every ``log_every_n_steps``.

    Both are sums over all processes, each taken to do what this one does. Padding is no token, though its FLOPs count.
    FLOPs go on counting in a resumed run. The speed is that of the steps alone: waiting for data, validation and saving
    are left out.
    """

    def __init__(self) -> None:
        self.training_flops = 0.0
        self._tokens: int | Tensor = 0  # stays on its device between two steps to log
        self._seconds = 0.0
        self._started = 0.0
        self._logged = 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Start the clock of one batch."""
        self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Charge one batch, and log when it is a step to log."""
        work: Work = outputs["work"]
        self.training_flops += work.training_flops * trainer.world_size
        self._tokens = self._tokens + work.tokens * trainer.world_size
        self._seconds += time.perf_counter() - self._started
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or step % every or step == self._logged:
            return
        self._logged = step
        pl_module.log("throughput/tokens_per_second", float(self._tokens) / self._seconds)
        pl_module.log("throughput/training_flops", self.training_flops)
        self._tokens, self._seconds = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """The FLOPs spent so far."""
        return {"training_flops": self.training_flops}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.training_flops = state_dict["training_flops"]
