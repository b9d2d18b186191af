"""What every task on MoE layers shares: auxiliary losses, the routers' running state, and the optimizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from evomoe.errors import ConfigError
from evomoe.models.flops import Work
from evomoe.moe import MoELayer
from evomoe.routing import Routing, Schedule, SparseRouting
from evomoe.run_length import to_steps, total_steps
from evomoe.tasks.optimization import Optimization
from evomoe.tasks.step_counts import StepCounts

BALANCE_SCOPES = ("local", "global")


class MoEModel(Protocol):
    """A network whose MoE layers have names."""

    @property
    def moe_layers(self) -> dict[str, MoELayer]:
        """The MoE layers by name, in the order of the routings that the network returns."""


@dataclass(frozen=True)
class Coefficient:
    """A loss coefficient that changes during the run.

    Args:
        start: its first value.
        end: its last value.
        length: optimizer steps (int) or share of the run (float in [0, 1]) of the way.
        shape: ``linear``, ``exponential``, ``cosine``, or ``step`` (``start`` until ``length``, then ``end``).
    """

    start: float
    end: float
    length: int | float
    shape: str = "linear"


class MoETask(L.LightningModule):
    """Base of the tasks.

    Args:
        model: the network.
        optimization: optimizer and learning-rate schedule.
        loss_coefficients: factor of each auxiliary loss by its name; losses that are not named count with 0.
        balance_scope: over what the balance losses count the experts' load: ``local``, the micro-batch of one process,
            or ``global``, all processes and the micro-batches of the optimizer step so far (arXiv 2501.11873).
    """

    reads: ClassVar[str | None] = None
    """What its batches hold, in the word of the datamodules that have them; None for those of any."""

    def __init__(
        self,
        model: MoEModel,
        optimization: Optimization,
        loss_coefficients: Mapping[str, float | Coefficient] | None = None,
        balance_scope: str = "local",
    ) -> None:
        super().__init__()
        if balance_scope not in BALANCE_SCOPES:
            raise ConfigError(f"task.balance_scope={balance_scope!r} is unknown: expected local or global")
        self.model: Any = model
        self.optimization = optimization
        self.loss_coefficients = dict(loss_coefficients or {})
        self.balance_scope = balance_scope
        routers = [layer.router for layer in model.moe_layers.values()]
        names = ", ".join(dict.fromkeys(type(router).__name__ for router in routers)) or "a dense model"
        known = {name for router in routers for name in router.loss_names}
        for name, coefficient in self.loss_coefficients.items():
            if routers and coefficient != 0 and name not in known:
                raise ConfigError(
                    f"router.loss_coefficients.{name}={coefficient}: {names} has no such loss (it has: "
                    f"{', '.join(sorted(known)) or 'none'}); name one of them or set the coefficient to 0"
                )
        if balance_scope == "global" and "balance" not in known:
            raise ConfigError(f"task.balance_scope=global needs a balance loss, and {names} has none: set it to local")
        self._schedules: dict[str, Schedule] = {}
        self._counts = StepCounts()

    def setup(self, stage: str) -> None:
        """Show the training text to the routers that ask for it; a checkpoint is restored after this."""
        readers = [layer.router for layer in self.model.moe_layers.values() if layer.router.reads_corpus]
        if stage == "fit" and readers:
            data = self.trainer.datamodule  # type: ignore[attr-defined]
            if not hasattr(data, "training_ids"):
                names = ", ".join(sorted({type(router).__name__ for router in readers}))
                raise ConfigError(f"{names} reads the training text: fit with a datamodule that has training_ids()")
            token_ids = data.training_ids()
            for router in readers:
                router.read_corpus(token_ids)

    def on_fit_start(self) -> None:
        """Resolve shares of the run, and forget the micro-batches of an earlier fit."""
        self._counts.clear()
        for name, value in self.loss_coefficients.items():
            if isinstance(value, Coefficient):
                length = to_steps(f"router.loss_coefficients.{name}.length", value.length, total_steps(self.trainer))
                self._schedules[name] = Schedule(value.start, value.end, length, value.shape)

    def on_train_start(self) -> None:
        """Go on with the options of this run where those of a checkpoint have been restored with its moments."""
        if type(self).configure_optimizers is not MoETask.configure_optimizers:
            return  # an optimizer of the subclass's own
        (optimizer,), (config,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
        self.optimization.hold(optimizer, config.scheduler)  # type: ignore[arg-type]

    def training_outputs(self, loss: Tensor, routings: Sequence[Routing], work: Work) -> dict[str, Any]:
        """What ``training_step`` returns: the loss to optimize, and for the callbacks what was done.

        Args:
            loss: of the task, a 0-dim tensor; logged as ``train/loss``.
            routings: of the MoE layers, in order.
            work: of the forward pass.
        """
        self.log("train/loss", loss, prog_bar=True)
        return {
            "loss": self.add_auxiliary_losses(loss, routings),
            "task_loss": loss.detach(),
            "routings": [routing.detach() for routing in routings],
            "work": work,
        }

    def add_auxiliary_losses(self, loss: Tensor, routings: Sequence[Routing]) -> Tensor:
        """The loss to optimize: ``loss`` and every auxiliary loss times its coefficient, summed over the layers.

        Each auxiliary loss is logged as ``train/loss_<name>``, its mean over the layers.
        """
        losses = self._losses(routings)
        for name in sorted({name for of_layer in losses for name in of_layer}):
            values = torch.stack([of_layer[name] for of_layer in losses if name in of_layer])
            coefficient = self._coefficient(name)
            if coefficient != 0:
                loss = loss + coefficient * values.sum()
            self.log(f"train/loss_{name}", values.detach().mean())
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then let the routers that keep running state update it, before any callback can save."""
        super().optimizer_step(*args, **kwargs)
        self._adapt_routers()

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

    def _losses(self, routings: Sequence[Routing]) -> list[dict[str, Tensor]]:
        """The auxiliary losses of each layer, the balance losses over their scope."""
        layers = self.model.moe_layers
        if self.balance_scope == "local" and not any(layer.router.adapts for layer in layers.values()):
            return [routing.losses for routing in routings]
        losses = []
        for name, routing in zip(layers, routings, strict=True):
            of_layer = dict(routing.losses)
            if layers[name].routes and isinstance(routing, SparseRouting):
                self._counts.add(name, routing)
                if self.balance_scope == "global" and routing.balance is not None:
                    of_layer["balance"] = self._counts.spread(name, routing.balance).loss()
            losses.append(of_layer)
        return losses

    def _coefficient(self, name: str) -> float:
        if name in self._schedules:
            return self._schedules[name].at(self.trainer.global_step)
        value = self.loss_coefficients.get(name, 0.0)
        return value.start if isinstance(value, Coefficient) else value

    def _adapt_routers(self) -> None:
        layers = self.model.moe_layers
        for name, statistics in self._counts.statistics().items():
            layers[name].router.after_optimizer_step(statistics)
        self._counts.clear()
