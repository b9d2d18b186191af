"""A moving average of the weights, which evaluations and checkpoints take in place of the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from evomoe.callbacks.evolution import moe_layers
from evomoe.errors import ConfigError


class WeightAverage(WeightAveraging):
    """Lightning's average of the weights, exponential, and aware of experts that are born.

    After each optimizer step ``average = decay * average + (1 - decay) * weights``, beginning with the weights after
    the first one. It begins anew where experts are born: before, they were never trained. Running states of the routers
    and the values of their schedule are not averaged, but copied.

    Validation and test measure the average. A checkpoint holds it as ``state_dict``, so that whatever restores one uses
    it, and the last weights beside it as ``current_model_state``, from which a resumed run goes on bit for bit.

    The average is kept in fp32 whatever the precision of the weights: in bf16 it would not move, as the share that a
    step adds to it is rounded away.

    Args:
        decay: share of the average that a step keeps; it reaches back over about ``1 / (1 - decay)`` steps.

    Raises:
        ConfigError: the decay is no share.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"callbacks.average.decay={decay}: expected a share in [0, 1), such as 0.999")
        super().__init__(use_buffers=False, multi_avg_fn=_averaging(decay))
        self._weights: list[Tensor] = []  # the last ones, while the model holds the average

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Make the average, in fp32 also of a model that a fit before has left in bf16."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            assert self._average_model is not None
            for parameter in self._average_model.parameters():
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Follow the model to its device, to which it moved after the average was made."""
        assert self._average_model is not None
        self._average_model.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the step into the average."""
        assert self._average_model is not None
        for (_, averaged), (_, layer) in zip(
            moe_layers(self._average_model.module), moe_layers(pl_module), strict=True
        ):
            if averaged.live_experts != layer.live_experts:
                averaged.live_experts = layer.live_experts
                self._average_model.n_averaged.zero_()  # so that the next update copies
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure the average, with the buffers as they are: the schedule has set them for this validation."""
        if self._average_model is not None:
            self._weights = [parameter.detach().clone() for parameter in pl_module.parameters()]
            self._take_average(pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the weights back; Lightning's swap would round an average of higher precision to theirs."""
        if self._average_model is not None:
            for parameter, weight in zip(pl_module.parameters(), self._weights, strict=True):
                parameter.data.copy_(weight)
            self._weights = []

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the average in the model also where no step was left to train, and so no training has ended."""
        self._take_average(pl_module)

    def _take_average(self, pl_module: L.LightningModule) -> None:
        """Put the average into the model, and the buffers of the model into the average."""
        assert self._average_model is not None
        average = self._average_model.module
        for averaged, parameter in zip(average.parameters(), pl_module.parameters(), strict=True):
            parameter.data.copy_(averaged.data)
        for copied, buffer in zip(average.buffers(), pl_module.buffers(), strict=True):
            copied.copy_(buffer)


def _averaging(decay: float) -> Any:
    """The update of averages by weights, which may be of another precision."""
    update = get_ema_multi_avg_fn(decay)

    def update_in_full(averages: Sequence[Tensor], weights: Sequence[Tensor], count: Tensor) -> None:
        update(averages, [weight.to(average.dtype) for average, weight in zip(averages, weights, strict=True)], count)

    return update_in_full
