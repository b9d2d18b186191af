"""Causal language modelling: predict the next token.

Shapes: B batch, S sequence, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import SumMetric

from evomoe.errors import ConfigError
from evomoe.models.gpt import GPT
from evomoe.routing import Routing
from evomoe.run_length import total_steps
from evomoe.tasks.optimization import Optimization

NO_TARGET = -100


class LanguageModeling(L.LightningModule):
    """Trains a :class:`GPT` on batches ``{"tokens": (B, S + 1)}``, and ``"valid": (B, S)`` where there is padding.

    The optimized loss is the mean cross-entropy plus, for every MoE layer, its auxiliary losses times their
    coefficients. Logged as ``train/loss`` is the cross-entropy alone; each auxiliary loss has a key of its own with its
    mean over the MoE layers. Validation and test measure two rules: ``val/loss`` routes as training does, without
    noise; ``val/loss_sparse`` by the router's final sparse rule.

    Args:
        model: the network.
        optimization: optimizer and learning-rate schedule.
        loss_coefficients: factor of each auxiliary loss by its name; losses that are not named count with 0.
    """

    def __init__(
        self, model: GPT, optimization: Optimization, loss_coefficients: Mapping[str, float] | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.optimization = optimization
        self.loss_coefficients = dict(loss_coefficients or {})
        for layer in model.moe_layers.values():
            for name, coefficient in self.loss_coefficients.items():
                if coefficient != 0 and name not in layer.router.loss_names:
                    known = ", ".join(layer.router.loss_names) or "none"
                    raise ConfigError(
                        f"router.loss_coefficients.{name}={coefficient}: {type(layer.router).__name__} has no such "
                        f"loss (it has: {known}); name one of them or set the coefficient to 0"
                    )
        # Sums, not means: a mean would leave out a batch whose loss is NaN, and report the rest as the whole.
        self.total_loss = SumMetric(nan_strategy="disable")
        self.total_loss_sparse = SumMetric(nan_strategy="disable")
        self.total_tokens = SumMetric(nan_strategy="disable")

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(B, S, V)`` of tokens ``(B, S)``."""
        return self.model(tokens)[0]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Any]:
        """One forward pass; returns the optimized loss, and for the callbacks the loss of the task and the routings."""
        total_loss, count, routings = self._cross_entropy(batch)
        loss = total_loss / count
        self.log("train/loss", loss, prog_bar=True)
        total = loss
        for name, value in sum_losses(routings).items():
            coefficient = self.loss_coefficients.get(name, 0.0)
            if coefficient != 0:
                total = total + coefficient * value
            self.log(f"train/loss_{name}", value.detach() / len(routings))
        return {"loss": total, "task_loss": loss.detach(), "routings": [routing.detach() for routing in routings]}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accumulate the loss under both rules."""
        self._evaluate(batch)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Accumulate the loss under both rules."""
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        """Log the mean loss over all tokens, and perplexities."""
        self._log_evaluation("val")

    def on_test_epoch_end(self) -> None:
        """Log the mean loss over all tokens, and perplexities."""
        self._log_evaluation("test")

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with its schedule, stepped once per optimizer step."""
        # Loss scaling clips unscaled gradients, and a fused step would unscale them itself.
        fused = getattr(self.trainer.precision_plugin, "scaler", None) is None
        optimizer = self.optimization.optimizer(self, fused=fused)
        scheduler = self.optimization.scheduler(optimizer, total_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, also for a fused optimizer under bfloat16: Lightning refuses the pair for the sake of loss scaling."""
        if gradient_clip_val and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            if gradient_clip_algorithm == "value":
                torch.nn.utils.clip_grad_value_(self.parameters(), gradient_clip_val)
            else:
                torch.nn.utils.clip_grad_norm_(self.parameters(), gradient_clip_val)
            return
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def _cross_entropy(
        self, batch: dict[str, Tensor], final_rule: bool = False
    ) -> tuple[Tensor, Tensor | int, list[Routing]]:
        """Sum over the real tokens, their number, and the routings."""
        tokens, valid = batch["tokens"], batch.get("valid")
        targets = tokens[:, 1:] if valid is None else tokens[:, 1:].masked_fill(~valid, NO_TARGET)  # (B, S)
        logits, routings = self.model(tokens[:, :-1], valid=valid, final_rule=final_rule)  # (B, S, V)
        scores = logits.flatten(0, 1).float()
        total = F.cross_entropy(scores, targets.flatten(), ignore_index=NO_TARGET, reduction="sum")
        return total, targets.numel() if valid is None else valid.sum(), routings

    def _evaluate(self, batch: dict[str, Tensor]) -> None:
        loss, count, _ = self._cross_entropy(batch)
        self.total_tokens.update(count)
        self.total_loss.update(loss)
        if self._rules_differ():
            loss, _, _ = self._cross_entropy(batch, final_rule=True)
        self.total_loss_sparse.update(loss)

    def _rules_differ(self) -> bool:
        layers = self.model.moe_layers.values()
        return any(layer.live_experts > 1 and layer.router.rules_differ for layer in layers)

    def _log_evaluation(self, split: str) -> None:
        units = self.trainer.datamodule.units(split)  # type: ignore[attr-defined]
        count = self.total_tokens.compute()
        for suffix, metric in (("", self.total_loss), ("_sparse", self.total_loss_sparse)):
            loss = metric.compute() / count
            metric.reset()
            values = {f"{split}/loss{suffix}": loss, f"{split}/perplexity{suffix}": loss.exp()}
            if not suffix:
                # Independent of the tokenizer: the same total surprise, shared among words or bytes.
                values[f"{split}/perplexity_word"] = (loss * units["tokens"] / units["words"]).exp()
                values[f"{split}/bits_per_byte"] = loss * units["tokens"] / units["bytes"] / math.log(2)
            # Equal on all processes already; sync_dist keeps Lightning from doubting it.
            self.log_dict(values, sync_dist=True)
        self.total_tokens.reset()


def sum_losses(routings: list[Routing]) -> dict[str, Tensor]:
    """Auxiliary losses by name, summed over the layers (the convention of the EvoMoE code)."""
    total: dict[str, Tensor] = {}
    for routing in routings:
        for name, value in routing.losses.items():
            total[name] = total[name] + value if name in total else value
    return total
