"""Logs what the routers do, from the routings that the training step returns."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from evomoe.callbacks.tensorboard import find_tensorboard, write_bars
from evomoe.routing.metrics import brief_metrics


class RoutingMonitor(L.Callback):
    """Logs ``moe/<layer>/...`` and the mean number of active experts, every ``log_every_n_steps``.

    Per MoE layer: ``active_experts`` (assignments per real token), ``rows`` (rows that the experts computed, per real
    token), ``load_max_violation``, ``router_entropy``, ``dropped``. Over all layers: ``moe/active_experts``. In
    TensorBoard also a histogram of the load, where ``histograms`` is set. Of a soft routing the load is what the tokens
    receive of each expert, and the active experts are the slots per token.

    Args:
        histograms: also log the tokens of each expert, per real token, as bars over the experts.
    """

    def __init__(self, histograms: bool = False) -> None:
        self.histograms = histograms
        self._logged = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the routings of the batch, when it is a step to log."""
        step, every = trainer.global_step, trainer.log_every_n_steps  # type: ignore[attr-defined]
        # A window of accumulation counts once, by its last batch.
        if not every or step % every or step == self._logged:
            return
        self._logged = step
        tensorboard = find_tensorboard(trainer) if self.histograms else None
        layers = list(pl_module.model.moe_layers)  # type: ignore[union-attr,arg-type]
        metrics: dict[str, Tensor] = {}
        active = []
        for layer, routing in zip(layers, outputs["routings"], strict=True):
            brief = brief_metrics(routing)
            brief["rows"] = routing.rows / routing.num_tokens.clamp(min=1)
            active.append(brief["active_experts"])
            metrics.update({f"moe/{layer}/{name}": value.float() for name, value in brief.items()})
            if tensorboard is not None:
                share = routing.load / routing.num_tokens.clamp(min=1)
                write_bars(tensorboard.experiment, f"moe/{layer}/load", share, trainer.global_step)
        if active:
            metrics["moe/active_experts"] = torch.stack(active).mean()
        pl_module.log_dict(metrics)
