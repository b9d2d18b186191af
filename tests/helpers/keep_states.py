"""What the weights were, while a run went on."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor

from evomoe.callbacks.evolution import moe_layers


class KeepStates(L.Callback):
    """The weights after every optimizer step, those of every validation with the temperature, and those of the test."""

    def __init__(self) -> None:
        self.trained: list[dict[str, Tensor]] = []
        self.validated: dict[int, dict[str, Tensor]] = {}
        self.temperatures: dict[int, float] = {}
        self.tested: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > len(self.trained):
            self.trained.append(copy_of(pl_module))

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.validated[trainer.global_step] = copy_of(pl_module)
        self.temperatures[trainer.global_step] = float(moe_layers(pl_module)[0][1].router.temperature)

    def on_test_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.tested = copy_of(pl_module)


def copy_of(task: L.LightningModule) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in task.state_dict().items()}
