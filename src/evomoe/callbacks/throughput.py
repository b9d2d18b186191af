"""Logs speed and the training FLOPs spent so far."""

from __future__ import annotations

import time
from typing import Any

import lightning as L

from evomoe.callbacks.summary import expert_rows
from evomoe.models.flops import TRAINING_FACTOR


class Throughput(L.Callback):
    """Logs ``throughput/tokens_per_second`` and ``throughput/training_flops`` every ``log_every_n_steps``.

    Both are sums over all processes, each taken to do what this one does. FLOPs go on counting in a resumed run. The
    speed is that of the steps alone: waiting for data, validation and saving are left out.
    """

    def __init__(self) -> None:
        self.training_flops = 0.0
        self._tokens = 0
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
        sequences, length = batch["tokens"].shape
        tokens = sequences * (length - 1)
        self.training_flops += batch_flops(trainer, pl_module, outputs, batch)
        self._tokens += tokens * trainer.world_size
        self._seconds += time.perf_counter() - self._started
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        if not every or step % every or step == self._logged:
            return
        self._logged = step
        pl_module.log("throughput/tokens_per_second", self._tokens / self._seconds)
        pl_module.log("throughput/training_flops", self.training_flops)
        self._tokens, self._seconds = 0, 0.0

    def state_dict(self) -> dict[str, Any]:
        """The FLOPs spent so far."""
        return {"training_flops": self.training_flops}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.training_flops = state_dict["training_flops"]


def batch_flops(trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any) -> float:
    """Training FLOPs of one batch over all processes, each taken to do what this one does.

    Charged are the matrix products of the forward pass, with the rows that the experts really computed, times three.
    What activation checkpointing computes a second time is not charged: it buys memory, and belongs to no method.

    Args:
        trainer: of the run.
        pl_module: its task.
        outputs: what ``training_step`` returned.
        batch: what it was given.
    """
    sequences, length = batch["tokens"].shape
    tokens = sequences * (length - 1)
    rows = [expert_rows(routing) / tokens for routing in outputs["routings"]]
    per_token = pl_module.model.flops_per_token(length - 1, rows)  # type: ignore[union-attr,operator]
    return TRAINING_FACTOR * per_token * tokens * trainer.world_size
